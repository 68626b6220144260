"""`avatar hints generate`: hints written ahead by a teacher behind an OpenAI-compatible endpoint
(docs/method.md 1.4), resumable and checked for leaks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from avatar_rl.cluster.annotation.asking import (
    Asking,
    Budget,
    EndpointOptions,
    TeacherReport,
    annotate,
)
from avatar_rl.common.chat_client import ChatClient, Messages, NoReply
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.hints import hint_leaks, text_leaks
from avatar_rl.prompts.record import Modality, Prompt
from avatar_rl.rewards.judges.base import ContentPart
from avatar_rl.rewards.judges.prompts import known_of

SEEN: tuple[Modality, ...] = ("video", "image")
LONGEST = 300  # characters of a hint
REFUSED = "hint_refused"  # in Prompt.extra: the teacher could not do without the answer

INSTRUCTIONS = """You tutor someone who answers questions about videos with sound. You are shown what there is of the
clip, and a JSON object with the question, what is seen and heard, and the true answer, which your student does not know.
Write one short sentence that tells the student how to go about it: what to look at or listen to first, what to compare
or to keep count of. Never state, spell, paraphrase or hint at the answer, name no option, and draw no conclusion
yourself. Reply with the sentence only.
Good: "Find the object that makes the sound first, then count how often it does." """
STRICTER = """Your last sentence gave the answer away. Write another one without any word, number, letter or option of
the answer, about the way of looking and listening only."""
REMINDER = f"Reply with one sentence of at most {LONGEST} characters and nothing else."


def generate(options: EndpointOptions, attach: tuple[Modality, ...] | None, frames: int) -> int:
    """Exit code as of ``annotate``. ``attach`` None: frames, and sound where the teacher takes
    it."""

    def said(counts: Counter[str]) -> str:
        return (
            f"{counts['written']} hints written, {counts['kept']} kept, {counts['done_before']} "
            f"done before, {counts['refused']} refused (the answer was in them twice), "
            f"{counts['failed']} without a reply"
        )

    shown = SEEN if attach is None else attach
    hinted = partial(generate_hints, attach=shown, frames=frames, try_sound=attach is None)
    return annotate(options, hinted, doing="asking the teacher", temperature=0.7, said=said)


def generate_hints(
    dataset: Path,
    out: Path,
    teacher: EndpointConfig,
    reader: DataConfig,
    *,
    progress: Callable[[int, int], None],
    attach: tuple[Modality, ...] = (),
    frames: int = 8,
    budget: Budget | None = None,
    try_sound: bool = False,
) -> TeacherReport:
    """Write the dataset's prompts with hints to ``out``; see ``Asking.run``.

    A prompt whose hint is there and holds no answer is kept. One whose teacher gives the answer
    away twice is written without a hint and marked ``extra.hint_refused``. ``attach`` names the
    media that the teacher is shown, at most ``frames`` frames of a prompt; ``try_sound`` adds the
    sound, where the teacher takes it."""
    asking = Asking(teacher, "hint teacher", _hinted, attach, frames, budget or Budget(), try_sound)
    return asking.run(dataset, out, reader, progress)


async def _hinted(
    client: ChatClient, prompt: Prompt, media: Sequence[ContentPart], counts: Counter[str]
) -> Prompt | None:
    """The prompt with its hint; None where the teacher gave no reply."""
    if prompt.hint and not hint_leaks(prompt):
        counts["kept"] += 1
        return prompt
    for strict in (False, True):
        first, again = (hint_messages(prompt, media, strict, remind) for remind in (False, True))
        hint = await client.ask(prompt.id, first, again, one_line)
        if isinstance(hint, NoReply):
            return None
        if not text_leaks(prompt, hint):
            counts["written"] += 1
            return prompt.model_copy(update={"hint": hint})
        counts["retried_leaks" if not strict else "refused"] += 1
    return prompt.model_copy(update={"hint": None, "extra": prompt.extra | {REFUSED: "true"}})


def hint_messages(
    prompt: Prompt, media: Sequence[ContentPart], strict: bool, remind: bool
) -> Messages:
    """Instructions, then frames and sound, and question, captions and truth as data."""
    material = known_of(prompt)
    if prompt.caption:
        material["seen"] = prompt.caption
    asides = [text for text, wanted in ((STRICTER, strict), (REMINDER, remind)) if wanted]
    text = "\n\n".join([json.dumps(material, ensure_ascii=False), *asides])
    content: str | list[ContentPart] = [*media, {"type": "text", "text": text}] if media else text
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": content}]


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
