"""MLVU: long videos, multiple choice; the dev set of 2,174 questions in seven tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import macro
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

_OPTION = re.compile(r"^\s*\(([A-F])\)\s*(.+?)\s*$", re.MULTILINE)


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows with ``video_name``; the options are lines "(A) ..." of the question, or a list."""
    for number, row in enumerate(
        folder.rows("data/*.parquet", "*.parquet", "json/*.json", "*.jsonl")
    ):
        text, options = _split(row)
        name, task = row.text("video_name", "video"), row.text("task_type", "question_type")
        yield Question(
            id=f"{name}-{number}",
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(video(folder.find(name, f"video/{name}", f"videos/{name}")),),
            official=joined(
                text,
                *(f"({one[0]}){one[2:]}" for one in options),
                "Only give the best option.",
                "Best option: (",
            ),
            parts={"task": task},
        )


def _split(row: SetRow) -> tuple[str, tuple[str, ...]]:
    text = row.text("question")
    if row.get("candidates"):
        return text, options_of(row, "candidates")
    options = tuple(f"{letter}. {words}" for letter, words in _OPTION.findall(text))
    return _OPTION.sub("", text).strip(), options


SET = BenchmarkSet(
    name="mlvu",
    title="MLVU",
    paper="https://arxiv.org/abs/2406.04264",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/mlvu",
    senses=("video",),
    read=read,
    means=macro("task"),
    deviation="the two generation tasks, which a language model judges, are not asked",
)
