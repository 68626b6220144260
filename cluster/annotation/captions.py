"""`avatar captions generate`: audio captions from the sound itself, by a model behind an
OpenAI-compatible endpoint (docs/method.md 1.6, Stage 2)."""

from __future__ import annotations

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
from avatar_rl.prompts.hints import text_leaks
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.judges.base import ContentPart

LONGEST = 1_000  # characters of a caption

# Neither question nor answer is shown: a caption that held the answer would give it to the policy.
INSTRUCTIONS = """You describe sounds. Listen to the recording and say in one to three sentences what is heard: which
things sound, how (pitch, loudness, rhythm), how often and in which order; what is said, in its own words, if there is
speech. Describe only what is heard. Reply with the description only."""
REMINDER = f"Reply with the description alone, at most {LONGEST} characters."


def generate(options: EndpointOptions, *, again: bool) -> int:
    """Exit code as of ``annotate``."""

    def said(counts: Counter[str]) -> str:
        lines = [
            f"{counts['written']} captions written, {counts['kept']} kept, {counts['silent']} "
            f"prompts without sound, {counts['done_before']} done before, {counts['failed']} "
            "without a reply"
        ]
        if counts["tells_answer"]:
            lines.append(
                f"{counts['tells_answer']} captions hold their prompt's answer "
                "(extra.tells_answer): the captioner knew neither question nor answer, so the "
                "sound says it"
            )
        return "\n".join(lines)

    return annotate(options, partial(generate_captions, again=again), doing="listening", said=said)


def generate_captions(
    dataset: Path,
    out: Path,
    captioner: EndpointConfig,
    reader: DataConfig,
    *,
    progress: Callable[[int, int], None],
    budget: Budget | None = None,
    again: bool = False,
) -> TeacherReport:
    """Write the dataset's prompts with ``audio_caption`` to ``out``; see ``Asking.run``.

    The captioner gets the sound alone. A caption that is there is kept, unless ``again``. Prompts
    without sound are written as they are. A caption that holds the answer is marked
    ``extra.tells_answer``."""

    async def captioned(
        client: ChatClient, prompt: Prompt, media: Sequence[ContentPart], counts: Counter[str]
    ) -> Prompt | None:
        if prompt.audio_caption and not again:
            counts["kept"] += 1
            return prompt
        if not media:
            counts["silent"] += 1
            return prompt
        first, reminded = (caption_messages(media, remind) for remind in (False, True))
        caption = await client.ask(prompt.id, first, reminded, caption_of)
        if isinstance(caption, NoReply):
            return None
        counts["written"] += 1
        changes: dict[str, object] = {"audio_caption": caption}
        if text_leaks(prompt, caption):
            counts["tells_answer"] += 1
            changes["extra"] = prompt.extra | {"tells_answer": "true"}
        return prompt.model_copy(update=changes)

    asking = Asking(captioner, "captioner", captioned, ("audio",), budget=budget or Budget())
    return asking.run(dataset, out, reader, progress)


def caption_messages(media: Sequence[ContentPart], remind: bool) -> Messages:
    """Instructions, then the sound."""
    text = "What is heard?" + (f"\n\n{REMINDER}" if remind else "")
    content: list[ContentPart] = [*media, {"type": "text", "text": text}]
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": content}]


def caption_of(reply: str) -> str:
    """The caption in one line. Raises ValueError for none, or one that is too long."""
    text = reply.partition("</think>")[2] if reply.lstrip().startswith("<think>") else reply
    caption = " ".join(text.split()).strip('"')
    if not 1 <= len(caption) <= LONGEST:
        raise ValueError(f"{len(caption)} characters, expected 1 to {LONGEST}")
    return caption
