"""`avatar hints generate`: hints written ahead by a teacher behind an OpenAI-compatible endpoint
(docs/method.md 1.4), resumable and checked for leaks."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console

from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.common.chat_client import ChatClient, Messages, NoReply
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.hints import hint_leaks, text_leaks
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.judges.prompts import known_of

LONGEST = 300  # characters of a hint
REFUSED = "hint_refused"  # in Prompt.extra: the teacher could not do without the answer

INSTRUCTIONS = """You tutor someone who answers questions about videos with sound. You are shown a JSON object with the
question, what is seen and heard, and the true answer, which your student does not know.
Write one short sentence that tells the student how to go about it: what to look at or listen to first, what to compare
or to keep count of. Never state, spell, paraphrase or hint at the answer, name no option, and draw no conclusion
yourself. Reply with the sentence only.
Good: "Find the object that makes the sound first, then count how often it does." """
STRICTER = """Your last sentence gave the answer away. Write another one without any word, number, letter or option of
the answer, about the way of looking and listening only."""
REMINDER = f"Reply with one sentence of at most {LONGEST} characters and nothing else."


@dataclass
class HintReport:
    """What was done; ``counts``: written, kept, retried_leaks, refused, failed, done_before."""

    out: Path
    counts: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0

    def cost(self, per_million_in: float, per_million_out: float) -> float:
        """In the currency of the two prices per million tokens."""
        return (
            self.prompt_tokens * per_million_in + self.completion_tokens * per_million_out
        ) / 1e6


def generate(
    dataset: Path,
    out: Path,
    teacher: EndpointConfig,
    *,
    recipe: Path | None,
    prices: tuple[float, float],
) -> int:
    """Exit code 1 when a prompt got no reply: run it again. ``prices`` of a million prompt tokens
    and of a million completion tokens."""
    reader = load_recipe(recipe).data.reader if recipe else DataConfig()
    console = Console(highlight=False)
    with console.status("asking the teacher") as status:
        report = generate_hints(
            dataset,
            out,
            teacher,
            reader,
            progress=lambda done, total: status.update(f"{done}/{total} prompts"),
        )
    counts = report.counts
    console.print(
        f"{counts['written']} hints written, {counts['kept']} kept, {counts['done_before']} done "
        f"before, {counts['refused']} refused (the answer was in them twice), "
        f"{counts['failed']} without a reply"
    )
    cost = report.cost(*prices)
    console.print(
        f"{report.requests} requests, {report.prompt_tokens:,} + {report.completion_tokens:,} "
        "tokens" + (f", cost {cost:.2f}" if cost else "")
    )
    console.print(f"dataset      {report.out}")
    return 1 if counts["failed"] else 0


def generate_hints(
    dataset: Path,
    out: Path,
    teacher: EndpointConfig,
    reader: DataConfig,
    *,
    progress: Callable[[int, int], None],
) -> HintReport:
    """Write the dataset's prompts with hints to ``out`` (native .jsonl, absolute media paths), a
    line as each is done.

    A rerun skips what ``out`` already has. A prompt whose hint is there and holds no answer is
    kept; one whose teacher gives the answer away twice is written without a hint and marked
    ``extra.hint_refused``; one without a reply is not written, so that a rerun asks again.
    ``progress`` is called with done and total. Raises ConfigError, DataError, or ResourceError
    where the endpoint cannot be used at all."""
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: hints are written as .jsonl; choose that suffix")
    if out.resolve() == dataset.resolve():
        raise ConfigError(f"--out {out} is the dataset itself: choose another file")
    prompts = list(PromptIndex.read([dataset], reader))
    done = _done(out)
    report = HintReport(out)
    waiting = [prompt for prompt in prompts if prompt.id not in done]
    report.counts["done_before"] = len(prompts) - len(waiting)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        asyncio.run(_generate(waiting, file, teacher, report, len(prompts), progress))
    return report


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


async def _generate(
    prompts: list[Prompt],
    file: IO[str],
    teacher: EndpointConfig,
    report: HintReport,
    total: int,
    progress: Callable[[int, int], None],
) -> None:
    client = ChatClient(
        teacher, role="hint teacher", named=lambda field: "--" + field.replace("_", "-")
    )
    try:
        await client.check()
        queue = iter(prompts)

        async def work() -> None:
            for prompt in queue:  # shared: the workers take turns
                written = await _hinted(client, prompt, report.counts)
                if written is not None:
                    file.write(written.model_dump_json(exclude_defaults=True) + "\n")
                    file.flush()
                progress(report.counts["done_before"] + _settled(report.counts), total)

        workers = [
            asyncio.create_task(work()) for _ in range(min(teacher.concurrency, len(prompts)))
        ]
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
    failed = report.counts["failed"]
    if failed and not report.counts["written"] + report.counts["refused"]:
        raise ResourceError(
            f"hint teacher at {teacher.base_url} gave no usable reply to any of {failed} prompts: "
            "see its log"
        )


def _settled(counts: Counter[str]) -> int:
    return sum(counts[name] for name in ("written", "kept", "refused", "failed"))


async def _hinted(client: ChatClient, prompt: Prompt, counts: Counter[str]) -> Prompt | None:
    """The prompt with its hint; None where the teacher gave no reply."""
    if prompt.hint and not hint_leaks(prompt):
        counts["kept"] += 1
        return prompt
    for strict in (False, True):
        first, again = (hint_messages(prompt, strict, remind) for remind in (False, True))
        hint = await client.ask(prompt.id, first, again, one_line)
        if isinstance(hint, NoReply):
            counts["failed"] += 1
            return None
        if not text_leaks(prompt, hint):
            counts["written"] += 1
            return prompt.model_copy(update={"hint": hint})
        counts["retried_leaks" if not strict else "refused"] += 1
    return prompt.model_copy(update={"hint": None, "extra": prompt.extra | {REFUSED: "true"}})


def hint_messages(prompt: Prompt, strict: bool, remind: bool) -> Messages:
    """Instructions, then question, captions and truth as data."""
    material = known_of(prompt)
    if prompt.caption:
        material["seen"] = prompt.caption
    asides = [text for text, wanted in ((STRICTER, strict), (REMINDER, remind)) if wanted]
    text = "\n\n".join([json.dumps(material, ensure_ascii=False), *asides])
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": text}]


def one_line(reply: str) -> str:
    """The sentence of a reply. Raises ValueError for none, several lines, or one that is too
    long."""
    text = reply.partition("</think>")[2] if reply.lstrip().startswith("<think>") else reply
    lines = [line.strip() for line in text.strip().strip('"').splitlines() if line.strip()]
    if len(lines) != 1:
        raise ValueError(f"{len(lines)} lines, expected one sentence")
    if len(lines[0]) > LONGEST:
        raise ValueError(f"{len(lines[0])} characters, expected at most {LONGEST}")
    return lines[0].removeprefix("Hint:").strip().strip('"')
