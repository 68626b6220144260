"""Asking a model about every prompt of a dataset: resumable, with a bound on what it costs, and with
the prompts' media where the model takes them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, TypeAlias, TypedDict

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.common.chat_client import ChatClient, Messages
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import AvatarError, ConfigError, ResourceError
from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.config import DataConfig, MediaConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.media.loader import DecodedAudio, has_sound
from avatar_rl.prompts.record import MediaItem, Modality, Prompt, resolve_uri
from avatar_rl.rewards.judges.attachments import MediaAttach, audio_part
from avatar_rl.rewards.judges.base import ContentPart

#: Prompts without a reply, and none with one, after which nothing more is asked.
HOPELESS = 16
#: A tenth of a second of silence.
_SOUND_CHECK: Messages = [
    {
        "role": "user",
        "content": [
            audio_part(DecodedAudio(np.zeros(1600, np.float32), 16_000)),
            {"type": "text", "text": "Reply with the word yes."},
        ],
    }
]
#: What becomes of one prompt: it with the reply, or None where there was no reply.
Ask: TypeAlias = Callable[
    [ChatClient, Prompt, Sequence[ContentPart], Counter[str]], Awaitable[Prompt | None]
]


class Annotator(Protocol):
    """Writes what it made of a dataset's prompts to a file; see ``Asking.run``."""

    def __call__(
        self,
        dataset: Path,
        out: Path,
        endpoint: EndpointConfig,
        reader: DataConfig,
        /,
        *,
        progress: Callable[[int, int], None],
        budget: Budget | None,
    ) -> TeacherReport: ...


class EndpointOptions(TypedDict):
    """The options of the command line that say whom to ask, and about what."""

    dataset: Path
    out: Path
    recipe: Path | None
    base_url: str
    model: str
    api_key_env: str | None
    concurrency: int
    deadline: float
    price_in: float
    price_out: float
    max_cost: float | None


@dataclass(frozen=True)
class Budget:
    """Prices per million tokens, and where asking stops; None: nowhere."""

    per_million_in: float = 0.0
    per_million_out: float = 0.0
    most: float | None = None

    @classmethod
    def of(cls, options: EndpointOptions) -> Budget:
        return cls(options["price_in"], options["price_out"], options["max_cost"])

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """In the currency of the prices."""
        return (
            prompt_tokens * self.per_million_in + completion_tokens * self.per_million_out
        ) / 1e6

    def check(self) -> None:
        """Raises ConfigError for a bound that no price can reach."""
        if self.most is not None and not self.per_million_in + self.per_million_out > 0:
            raise ConfigError("--max-cost needs --price-in or --price-out: nothing would count")


@dataclass
class TeacherReport:
    """What was done; ``counts``: done_before, failed, unasked, media_failed, and what ``Ask``
    counts: written with a reply, refused, kept without one."""

    out: Path
    counts: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0

    def cost(self, per_million_in: float, per_million_out: float) -> float:
        """In the currency of the two prices per million tokens."""
        return Budget(per_million_in, per_million_out).cost(
            self.prompt_tokens, self.completion_tokens
        )

    def print_cost(self, console: Console, budget: Budget) -> int:
        """Requests, tokens and cost; exit code 1 when prompts are left to be asked."""
        cost = self.cost(budget.per_million_in, budget.per_million_out)
        console.print(
            f"{self.requests} requests, {self.prompt_tokens:,} + {self.completion_tokens:,} tokens"
            + (f", cost {cost:.2f}" if cost else "")
        )
        if left := self.counts["unasked"]:
            console.print(
                f"{left} prompts not asked: the cost reached --max-cost {budget.most:g}; run it "
                "again with a higher one"
            )
        console.print(f"dataset      {self.out}")
        return int(self.counts["failed"] + left > 0)


@dataclass(frozen=True)
class Asking:
    """One pass over a dataset."""

    teacher: EndpointConfig
    role: str  # of the endpoint, for messages
    ask: Ask
    attach: tuple[Modality, ...] = ()
    frames: int = 8
    budget: Budget = Budget()
    #: Show the sound, too, if the endpoint takes any: one short request asks it, before the first
    #: prompt that has sound.
    try_sound: bool = False

    def run(
        self,
        dataset: Path,
        out: Path,
        reader: DataConfig,
        progress: Callable[[int, int], None],
    ) -> TeacherReport:
        """Write the dataset's prompts to ``out`` (native .jsonl, absolute media paths), a line as
        each is done.

        A rerun skips what ``out`` already has. A prompt without a reply is not written, so that a
        rerun asks again. Nothing more is asked once the budget is used up. ``progress`` is called
        with done and total. Raises ConfigError, DataError, or ResourceError where the endpoint
        cannot be used at all.
        """
        self.budget.check()
        if out.suffix != ".jsonl":
            raise ConfigError(f"--out {out}: prompts are written as .jsonl; choose that suffix")
        if out.resolve() == dataset.resolve():
            raise ConfigError(f"--out {out} is the dataset itself: choose another file")
        prompts = list(PromptIndex.read([dataset], reader))
        done = _done(out)
        report = TeacherReport(out)
        waiting = [prompt for prompt in prompts if prompt.id not in done]
        report.counts["done_before"] = len(prompts) - len(waiting)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            asyncio.run(self._all(waiting, file, report, len(prompts), progress))
        return report

    async def _all(
        self,
        prompts: list[Prompt],
        file: IO[str],
        report: TeacherReport,
        total: int,
        progress: Callable[[int, int], None],
    ) -> None:
        client = ChatClient(
            self.teacher, role=self.role, named=lambda field: "--" + field.replace("_", "-")
        )
        written = 0
        try:
            await client.check()
            attach = await self._kinds(client, prompts)
            queue = iter(prompts)

            async def work() -> None:
                nonlocal written
                for prompt in queue:  # shared: the workers take turns
                    if self._spent(client) or self._refuses(report.counts):
                        report.counts["unasked"] += 1
                        continue
                    answered = await self._one(client, prompt, attach, report.counts)
                    if answered is None:
                        report.counts["failed"] += 1
                    else:
                        written += 1
                        file.write(answered.model_dump_json(exclude_defaults=True) + "\n")
                        file.flush()
                    progress(
                        report.counts["done_before"] + written + report.counts["failed"], total
                    )

            count = min(self.teacher.concurrency, len(prompts))
            workers = [asyncio.create_task(work()) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
        finally:
            report.requests = client.counts["requests"]
            report.prompt_tokens = client.counts["prompt_tokens"]
            report.completion_tokens = client.counts["completion_tokens"]
            await client.close()
        if report.counts["failed"] and not report.counts["written"] + report.counts["refused"]:
            shown = f", and whether it takes {' and '.join(self.attach)}" if self.attach else ""
            raise ResourceError(
                f"{self.role} at {self.teacher.base_url} gave no usable reply to any of "
                f"{report.counts['failed']} prompts: see its log{shown}"
            )

    async def _kinds(self, client: ChatClient, prompts: Sequence[Prompt]) -> tuple[Modality, ...]:
        """What is shown: ``attach``, and sound where it is to be tried and the endpoint takes
        it."""
        if not self.try_sound or not await asyncio.to_thread(_any_sound, prompts):
            return self.attach
        if await client.takes(_SOUND_CHECK):
            return (*self.attach, "audio")
        Console(stderr=True).print(
            f"{self.role} at {self.teacher.base_url} takes no sound: it is shown "
            f"{' and '.join(self.attach) or 'text'} only (--attach video --attach audio insists)",
            markup=False,
        )
        return self.attach

    async def _one(
        self,
        client: ChatClient,
        prompt: Prompt,
        attach: tuple[Modality, ...],
        counts: Counter[str],
    ) -> Prompt | None:
        """The answered prompt; None where there was no reply, or its media cannot be shown."""
        try:
            media = await asyncio.to_thread(self._media, prompt, attach)
        except (AvatarError, OSError) as error:
            counts["media_failed"] += 1
            if counts["media_failed"] == 1:
                Console(stderr=True).print(f"prompt {prompt.id}: {error}", markup=False)
            return None
        return await self.ask(client, prompt, media, counts)

    def _media(self, prompt: Prompt, attach: tuple[Modality, ...]) -> Sequence[ContentPart]:
        if not attach:
            return ()
        if "audio" in attach:
            prompt = heard(prompt)
        # Every prompt is shown once: nothing is worth keeping.
        config = MediaConfig(memory_cache_bytes=0)
        return MediaAttach(config, attach, frames=self.frames)(prompt)

    @staticmethod
    def _refuses(counts: Counter[str]) -> bool:
        """Nothing but failures so far: it will not get better with the prompts that are left."""
        return counts["failed"] >= HOPELESS and not counts["written"] + counts["refused"]

    def _spent(self, client: ChatClient) -> bool:
        most, counts = self.budget.most, client.counts
        cost = self.budget.cost(counts["prompt_tokens"], counts["completion_tokens"])
        return most is not None and cost >= most


def heard(prompt: Prompt) -> Prompt:
    """The prompt with the sound tracks of its videos, where it names no sound of its own."""
    media = prompt.media
    if media.of("audio"):
        return prompt
    tracks = tuple(
        MediaItem(kind="audio", uri=item.uri, clip=item.clip, digest=item.digest)
        for item in media.of("video")
        if has_sound(resolve_uri(item.uri, Path()))
    )
    items = {"items": (*media.items, *tracks)}
    return prompt.model_copy(update={"media": media.model_copy(update=items)})


def _any_sound(prompts: Sequence[Prompt]) -> bool:
    return any(heard(prompt).media.of("audio") for prompt in prompts)


def annotate(
    options: EndpointOptions,
    annotator: Annotator,
    *,
    doing: str,
    temperature: float = 0.0,
    said: Callable[[Counter[str]], str],
) -> int:
    """Runs ``annotator`` as the options say, with its progress on the terminal; then prints what
    ``said`` makes of the counts, and the cost.

    Exit code 1 when a prompt got no reply or was not asked: run it again."""
    budget = Budget.of(options)
    console = Console(highlight=False)
    with console.status(doing) as status:
        report = annotator(
            options["dataset"],
            options["out"],
            endpoint_of(options, temperature=temperature),
            reader_of(options),
            progress=lambda done, total: status.update(f"{done}/{total} prompts"),
            budget=budget,
        )
    console.print(said(report.counts))
    return report.print_cost(console, budget)


def endpoint_of(options: EndpointOptions, *, temperature: float) -> EndpointConfig:
    """The endpoint that the options name. Raises ConfigError for a value that none can have."""
    try:
        return EndpointConfig(
            base_url=options["base_url"],
            model=options["model"],
            api_key_env=options["api_key_env"],
            temperature=temperature,
            concurrency=options["concurrency"],
            deadline_s=options["deadline"],
        )
    except ValidationError as error:
        told = (
            f"--{str(one['loc'][0]).replace('_', '-')} {one['input']}: {one['msg']}"
            for one in error.errors()
        )
        raise ConfigError("; ".join(told)) from error


def reader_of(options: EndpointOptions) -> DataConfig:
    """How the dataset is read: as the recipe says, if one is named."""
    recipe = options["recipe"]
    return DataConfig() if recipe is None else load_recipe(recipe).data.reader


def _done(out: Path) -> set[str]:
    """Ids in ``out``; a torn last line is cut off."""
    if not out.is_file():
        return set()
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with out.open("r+b") as file:
            file.truncate(whole)
    return {str(row["id"]) for row in read_jsonl(out)}
