"""OmniVideoBench: reasoning over picture and sound in videos up to 30 minutes; 1,000 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import LETTER_ONLY, gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow, seconds
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.common.errors import InputError


def read(folder: SetFolder) -> Iterator[Question]:
    """data.json: one entry for each video, with a list of questions; videos/<video>.mp4."""
    for row in folder.rows("data.json", "*.json"):
        name = row.text("video")
        stem = name.removesuffix(".mp4")
        path = folder.find(f"videos/{stem}.mp4", f"{stem}.mp4")
        length = seconds(row.need("duration"), row.where)
        asked = row.need("questions")
        if not isinstance(asked, list):
            raise InputError(row.where, "'questions' is no list", "correct the row")
        for number, one in enumerate(asked):
            if not isinstance(one, dict):
                raise InputError(row.where, f"question {number} is no object", "correct the row")
            inner = SetRow(one, f"{row.where}, question {number}")
            options = options_of(inner, "options")
            text = inner.text("question")
            yield Question(
                id=f"{stem}-{number}",
                text=text,
                answer=gold_letter(inner, options, "correct_option"),
                kind="choice",
                options=options,
                media=(video(path),),
                official=joined(text, *options, LETTER_ONLY),
                parts={
                    "duration": _bucket(length),
                    "type": str(inner.get("question_type")),
                    "audio": str(inner.get("audio_type") or row.get("audio_type")),
                },
            )


def _bucket(length: float) -> str:
    """The four lengths that the paper reports by."""
    for limit, name in ((60, "(0,1] min"), (300, "(1,5] min"), (600, "(5,10] min")):
        if length <= limit:
            return name
    return "(10,30] min"


SET = BenchmarkSet(
    name="omnivideobench",
    title="OmniVideoBench",
    paper="https://arxiv.org/abs/2510.10689",
    layout="https://github.com/NJU-LINK/OmniVideoBench",
    senses=("video", "audio"),
    read=read,
    means=accuracy,
    listens=True,
)
