"""Video-TT (Video Thinking Test): 1,000 short videos; the multiple-choice question of each."""

from __future__ import annotations

import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, video
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.common.errors import InputError

_OPTION = re.compile(r"^\s*\(?([A-H])[).:]\s*(.+?)\s*$", re.MULTILINE)


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows whose ``question_prompt`` holds the options as lines "A. ..."."""
    for number, row in enumerate(
        folder.rows("data/test-*.parquet", "test-*.parquet", "*.parquet", "*.jsonl")
    ):
        options = _options(row)
        text, clip = row.text("question"), row.text("video_id")
        path = f"Benchmark-AllVideos-LQ/{clip}"
        yield Question(
            id=str(row.get("qid", "question_id") or f"{clip}-{number}"),
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(video(folder.find(f"{path}.mp4", f"{path}.MP4", f"{path}.mkv")),),
            official=joined(text, row.text("question_prompt")),
            parts={"capability": row.text("capability")},
        )


def _options(row: SetRow) -> tuple[str, ...]:
    prompt = row.text("question_prompt")
    options = tuple(f"{letter}. {words}" for letter, words in _OPTION.findall(prompt))
    if len(options) < 2:
        raise InputError(
            row.where, "question_prompt holds no lines 'A. ...'", "take the split of single choice"
        )
    return options


SET = BenchmarkSet(
    name="video_tt",
    title="Video-TT",
    paper="https://arxiv.org/abs/2507.15028",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/video-tt",
    senses=("video",),
    read=read,
    means=accuracy,
    deviation="the open questions, which the authors let a language model judge, are not asked",
    listens=True,
)
