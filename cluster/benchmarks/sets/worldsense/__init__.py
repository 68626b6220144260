"""WorldSense: clips with sound from eight domains, 26 tasks; 3,172 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

_ASK = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
    "These are the frames of a video and the corresponding audio. Select the best answer to the "
    "following multiple-choice question based on the video. Respond with only the letter (A, B, C, "
    "or D) of the correct option."
)


def read(folder: SetFolder) -> Iterator[Question]:
    """Parquet rows that name their video by ``video_path``."""
    for row in folder.rows("data/*.parquet", "*.parquet", "*.jsonl", "*.json"):
        options = options_of(row, "candidates")
        text = row.text("question")
        classes = row.get("audio_class")
        yield Question(
            id=row.text("index"),
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(video(folder.find(row.text("video_path"))),),
            official=joined(_ASK, text, *options),
            parts={
                "task": row.text("task_type"),
                "domain": row.text("task_domain"),
                "duration": row.text("duration"),
                "audio": tuple(map(str, classes)) if isinstance(classes, list) else str(classes),
            },
        )


SET = BenchmarkSet(
    name="worldsense",
    title="WorldSense",
    paper="https://arxiv.org/abs/2502.04326",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/worldsense",
    senses=("video", "audio"),
    read=read,
    means=accuracy,
    deviation="no answer is wrong; the published task counts it as A",
    listens=True,
)
