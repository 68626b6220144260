"""Video-MME: short, medium and long videos, without subtitles; 2,700 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

_ASK = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)


def read(folder: SetFolder) -> Iterator[Question]:
    """videomme/test-*.parquet; videos in data/<videoID>.mp4."""
    for row in folder.rows("videomme/*.parquet", "test-*.parquet", "*.parquet", "*.jsonl"):
        options = options_of(row, "options")
        text, clip = row.text("question"), row.text("videoID")
        path = folder.find(f"data/{clip}.mp4", f"data/{clip}.MP4", f"data/{clip}.mkv")
        yield Question(
            id=row.text("question_id"),
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(video(path),),
            official=joined(_ASK, text, *options, "The best answer is:"),
            parts={
                "duration": row.text("duration"),
                "domain": row.text("domain"),
                "subcategory": row.text("sub_category"),
                "task": row.text("task_type"),
            },
        )


SET = BenchmarkSet(
    name="videomme",
    title="Video-MME",
    paper="https://arxiv.org/abs/2405.21075",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/videomme",
    senses=("video",),
    read=read,
    means=accuracy,
    listens=True,
)
