"""OmniBench: a picture and a sound, four options; 1,142 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import (
    LETTER_ONLY,
    audio,
    gold_letter,
    image,
    joined,
    options_of,
)
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question


def read(folder: SetFolder) -> Iterator[Question]:
    """The authors' JSON Lines with mm_data/, or parquet files that hold picture and sound."""
    for row in folder.rows("dataset/*.jsonl", "*.jsonl", "data/*.parquet", "*.parquet"):
        options = options_of(row, "options")
        text = row.text("question")
        if isinstance(row.get("audio_path"), str) and not isinstance(row.get("audio"), dict):
            sound = folder.find(f"mm_data/audio/{row.text('audio_path')}")
            picture = folder.find(f"mm_data/image/{row.text('image_path')}")
        else:
            sound = folder.embedded(row.need("audio"), row.where)
            picture = folder.embedded(row.need("image"), row.where)
        yield Question(
            id=row.text("index"),
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(audio(sound), image(picture)),
            official=joined("Question:", text, "", "Options:", *options, "", LETTER_ONLY),
            parts={"task": row.text("task type"), "audio": row.text("audio type")},
        )


SET = BenchmarkSet(
    name="omnibench",
    title="OmniBench",
    paper="https://arxiv.org/abs/2409.15272",
    layout="https://github.com/multimodal-art-projection/OmniBench",
    senses=("audio", "image"),
    read=read,
    means=accuracy,
)
