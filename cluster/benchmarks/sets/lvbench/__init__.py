"""LVBench: videos of half an hour and more; 1,549 questions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

_OPTION = re.compile(r"^\(?([A-H])[).]\s*(.+)$", re.MULTILINE)


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows with ``video_path``; the options are a column, or lines "(A) ..." of the question."""
    for number, row in enumerate(folder.rows("data/*.parquet", "*.parquet", "*.jsonl", "*.json")):
        text = row.text("question")
        if row.get("options"):
            options = options_of(row, "options")
        else:
            options = tuple(f"{letter}. {words.strip()}" for letter, words in _OPTION.findall(text))
            text = _OPTION.sub("", text).strip()
        types = row.get("question_type", "type")
        yield Question(
            id=str(row.get("uid", "key", "id") or f"{row.text('video_path')}-{number}"),
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(video(folder.find(row.text("video_path"), _below(row))),),
            official=joined(
                text,
                *(f"({one[0]}){one[2:]}" for one in options),
                "",
                "Answer the question with the option letter.",
            ),
            parts={"type": tuple(map(str, types)) if isinstance(types, list) else str(types)},
        )


def _below(row: SetRow) -> str:
    return f"all_videos/{row.text('video_path').rpartition('/')[2]}"


SET = BenchmarkSet(
    name="lvbench",
    title="LVBench",
    paper="https://arxiv.org/abs/2406.08035",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/lvbench",
    senses=("video",),
    read=read,
    means=accuracy,
)
