"""Questions of a public set as prompts: what is asked of the model, and with which media."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.marks import gold_fault
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Kind, Question
from avatar_rl.common.errors import ConfigError, InputError
from avatar_rl.common.files import json_line, replaced_file
from avatar_rl.common.text import shortened
from avatar_rl.prompts.media.loader import has_sound
from avatar_rl.prompts.record import MediaItem, MediaPlan, Modality, ProblemType, Prompt

#: ``recipe``: the question and its options in the recipe's template, as the model was trained.
#: ``official``: the authors' words alone.
Wording = Literal["recipe", "official"]

_MAX_NAMED = 10  # rows that an error names

_TYPES: dict[Kind, ProblemType] = {
    "choice": ProblemType.MULTIPLE_CHOICE,
    "choices": ProblemType.MULTI_LABEL,
    "count": ProblemType.NUMERICAL,
    "number": ProblemType.NUMERICAL,
    "relative": ProblemType.REGRESSION,
    "yes_no": ProblemType.FREE_FORM,
    "text": ProblemType.FREE_FORM,
}


def senses_of(model: Path) -> set[Modality]:
    """What a model takes besides text, by its config. Raises ConfigError without a config."""
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model} has no readable config.json: name a model folder") from error
    parts = config.get("thinker_config", config)
    senses: set[Modality] = set()
    if "vision_config" in parts:
        senses |= {"image", "video"}
    if "audio_config" in parts:
        senses.add("audio")
    return senses


def lacking(one: BenchmarkSet, senses: set[Modality]) -> list[Modality]:
    """The senses that the set needs and the model lacks."""
    return [sense for sense in one.senses if sense not in senses]


def check_kinds(
    one: BenchmarkSet, questions: Sequence[Question], senses: set[Modality], model: Path
) -> None:
    """Raises ConfigError where a question shows what the model does not take: a set may be about
    more than it says."""
    for question in questions:
        for item in question.media:
            if item.kind not in senses:
                raise ConfigError(
                    f"{one.name}, question {question.id}, holds {item.kind}, and {model} takes no "
                    f"{item.kind}: leave the set out"
                )


def read_questions(
    one: BenchmarkSet, root: Path, media: Path, *, limit: int | None = None, skip: bool = False
) -> tuple[list[Question], int]:
    """The questions of a downloaded set, and how many were left out for missing media.

    Args:
        media: folder for pictures that are stored inside the rows.
        limit: the first questions alone.
        skip: leave questions without their media out instead of refusing.

    Raises InputError naming the file or rows at fault, before anything is asked: media that are not
    there, and gold answers that no completion can reach."""
    folder = SetFolder(root, media)
    found: list[Question] = []
    faults: list[str] = []
    absent: set[str] = set()
    for question in one.read(folder):
        found.append(question)
        # A set with a rule of its own knows how its answers are meant.
        if one.marked_by is None and (fault := gold_fault(question)):
            faults.append(shortened(f"{folder.at}, question {question.id}: {fault}", 300))
        if limit is not None and len(found) == limit:
            break
    _check_gold(faults, root)
    if folder.missing:
        if not skip:
            folder.check_media(questions=len(found))
        absent = {str(path.resolve()) for path in folder.missing}
    kept = [q for q in found if not any(item.uri in absent for item in q.media)]
    _check_ids(kept, root)
    if not kept:
        raise InputError(root, "no question is left to ask", "see whether its media are unpacked")
    return kept, len(found) - len(kept)


class GoldError(InputError):
    """Gold answers that no completion can reach, several of them in one message."""

    MOST_CHARS = 400 * _MAX_NAMED


def _check_gold(faults: Sequence[str], root: Path) -> None:
    if not faults:
        return
    more = f" and {len(faults) - _MAX_NAMED} more" if len(faults) > _MAX_NAMED else ""
    raise GoldError(
        root,
        f"{len(faults)} gold answers that no completion can reach: "
        f"{'; '.join(faults[:_MAX_NAMED])}{more}",
        "correct these rows or leave them out",
    )


def _check_ids(questions: Sequence[Question], root: Path) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(
                root, f"two questions have the id {question.id!r}", "is a file there twice?"
            )
        seen.add(question.id)


def to_prompt(one: BenchmarkSet, question: Question, wording: Wording, *, hears: bool) -> Prompt:
    """The prompt of a question; ids are "<set>/<question id>".

    Where the model hears and the sound belongs to the set, the sound of its videos goes along."""
    official = wording == "official" and bool(question.official)
    return Prompt(
        id=f"{one.name}/{question.id}",
        question=question.official if official else question.text,
        answer=question.answer,
        # The authors' words hold the options, and the set's own rules mark the answer.
        problem_type=ProblemType.FREE_FORM if official else _TYPES[question.kind],
        options=() if official else question.options,
        media=_plan(one, question, hears),
        category=one.name,
        needs=tuple(dict.fromkeys(item.kind for item in question.media)),
    )


def _plan(one: BenchmarkSet, question: Question, hears: bool) -> MediaPlan:
    videos = [item for item in question.media if item.kind == "video"]
    alone = len(videos) == len(question.media) > 0
    if not (hears and one.listens and alone and all(has_sound(Path(v.uri)) for v in videos)):
        return MediaPlan(items=question.media, in_text=question.in_text)
    tracks = tuple(MediaItem(kind="audio", uri=item.uri, clip=item.clip) for item in videos)
    return MediaPlan(
        items=(*question.media, *tracks), in_text=question.in_text, audio_in_video=True
    )


def write_prompts(path: Path, prompts: Iterator[Prompt]) -> int:
    """Native rows of ``prompts``; returns how many. Usable as ``data.heldout`` of any recipe."""
    number = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as beside, beside.open("wb") as file:
        for prompt in prompts:
            row = prompt.model_dump(mode="json", exclude_defaults=True)
            file.write(json_line({"media": {"items": []}} | row))
            number += 1
    return number
