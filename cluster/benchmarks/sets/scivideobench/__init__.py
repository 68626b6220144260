"""SciVideoBench: experiments of four sciences, ten options; 1,000 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import LETTER_ONLY, gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows with ``video_id``; videos are jove_<video_id>.mp4."""
    for number, row in enumerate(folder.rows("data/*.parquet", "*.parquet", "*.jsonl", "*.json")):
        options = options_of(row, "options")
        text, clip = row.text("question"), row.text("video_id")
        names = [f"jove_{clip}.{end}" for end in ("mp4", "MP4", "mkv")]
        yield Question(
            id=f"{clip}-{number}",
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(video(folder.find(*names, *(f"videos/{name}" for name in names))),),
            official=joined(text, *options, "", LETTER_ONLY),
            parts={"type": row.text("question_type"), "category": row.text("category")},
        )


SET = BenchmarkSet(
    name="scivideobench",
    title="SciVideoBench",
    paper="https://arxiv.org/abs/2510.08559",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/scivideobench",
    senses=("video",),
    read=read,
    means=accuracy,
    deviation="times in a question stay times: the published task turns them into frame numbers; "
    "no answer is wrong, where it draws a letter",
    listens=True,
)
