"""`avatar data score`: how much a sample needs picture and sound, and whether question and answer
hold, by a model that sees and hears the clip (docs/method.md 2.4)."""

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
from avatar_rl.cluster.annotation.funnel import write_step
from avatar_rl.common.chat_client import ChatClient, Messages, NoReply
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.types import Json
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.record import Modality, Prompt
from avatar_rl.rewards.judges.base import ContentPart
from avatar_rl.rewards.judges.prompts import json_objects, known_of

SCORES = "scores"  # in Prompt.extra: {"video": 9, "audio": 10, "logic": 8, "answer": 10, ...}
#: Key of the reply -> our name, in the order of docs/method.md 2.4.
KEYS = {
    "video_dependency": "video",
    "audio_dependency": "audio",
    "question_logic": "logic",
    "answer_accuracy": "answer",
    "composite": "composite",
}

# The authors' wording is not published; the five scores and their range are theirs.
INSTRUCTIONS = """You judge questions about videos with sound before a model is trained on them. You are shown what
there is of a clip, and a JSON object with the question, its options and the answer that is held for true. Give five
whole numbers from 0 (not at all) to 10 (entirely):
video_dependency: the question cannot be answered without the picture;
audio_dependency: it cannot be answered without the sound;
question_logic: it is well posed, clear, and has one answer;
answer_accuracy: the given answer is right for this clip;
composite: how much a model that sees and hears would learn from it.
Reply with one JSON object of these five keys and nothing else."""
REMINDER = (
    f"Reply with one JSON object with the whole numbers {', '.join(KEYS)}, each from 0 to 10."
)


def score(options: EndpointOptions, attach: tuple[Modality, ...], frames: int) -> int:
    """Exit code as of ``annotate``."""

    def said(counts: Counter[str]) -> str:
        return (
            f"{counts['written']} samples scored, {counts['kept']} had scores, "
            f"{counts['done_before']} done before, {counts['failed']} without a usable reply"
        )

    scored = partial(score_dataset, attach=attach, frames=frames)
    return annotate(options, scored, doing="scoring", said=said)


def score_dataset(
    dataset: Path,
    out: Path,
    scorer: EndpointConfig,
    reader: DataConfig,
    *,
    progress: Callable[[int, int], None],
    attach: tuple[Modality, ...] = ("video", "image", "audio"),
    frames: int = 8,
    budget: Budget | None = None,
) -> TeacherReport:
    """Write the dataset's samples with ``extra.scores`` to ``out``; see ``Asking.run``.

    A sample that has its scores is kept. One without a usable reply is not written, so that a rerun
    asks it again: none is lost, none is scored twice."""
    asking = Asking(scorer, "scorer", _scored, attach, frames, budget or Budget())
    report = asking.run(dataset, out, reader, progress)
    write_step("score", dataset, out, {"unscored": report.counts["failed"]})
    return report


async def _scored(
    client: ChatClient, prompt: Prompt, media: Sequence[ContentPart], counts: Counter[str]
) -> Prompt | None:
    if isinstance(prompt.extra.get(SCORES), dict):
        counts["kept"] += 1
        return prompt
    first, reminded = (score_messages(prompt, media, remind) for remind in (False, True))
    scores = await client.ask(prompt.id, first, reminded, scores_of)
    if isinstance(scores, NoReply):
        return None
    counts["written"] += 1
    return prompt.model_copy(update={"extra": prompt.extra | {SCORES: dict(scores)}})


def score_messages(prompt: Prompt, media: Sequence[ContentPart], remind: bool) -> Messages:
    """Instructions, then frames and sound, and question, options and answer as data."""
    material = known_of(prompt)
    text = json.dumps(material, ensure_ascii=False) + (f"\n\n{REMINDER}" if remind else "")
    content: list[ContentPart] = [*media, {"type": "text", "text": text}]
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": content}]


def scores_of(reply: str) -> dict[str, int]:
    """The five scores. Raises ValueError where one is missing, no whole number, or outside 0 to
    10."""
    found = next((one for one in json_objects(reply) if KEYS.keys() & one.keys()), {})
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise ValueError(f"no {', no '.join(missing)}")
    scores: dict[str, int] = {}
    for key, name in KEYS.items():
        scores[name] = _whole(key, found[key])
    return scores


def _whole(key: str, value: Json) -> int:
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if number.is_integer() and 0 <= number <= 10:
            return int(number)
    raise ValueError(f"{key} is {value!r}, expected a whole number from 0 to 10")
