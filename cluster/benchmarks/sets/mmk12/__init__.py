"""MMK12: school questions of four sciences with a figure; the 2,000 of its test split."""

from __future__ import annotations

import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, image
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

_OPTION = re.compile(r"(?:^|(?<=\s))\(?([A-H])[.:)]\s*(.+?)(?=\s+\(?[A-H][.:)]\s|\s*\Z)", re.DOTALL)


def read(folder: SetFolder) -> Iterator[Question]:
    """data/test-*.parquet; the options stand in the question."""
    for row in folder.rows("data/test-*.parquet", "test-*.parquet", "test.jsonl"):
        text = row.text("question").replace("<image>", "").strip()
        options = tuple(f"{letter}. {words.strip()}" for letter, words in _OPTION.findall(text))
        subject = row.get("subject")
        yield Question(
            id=row.text("id"),
            text=_OPTION.sub("", text).strip() or text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(image(folder.embedded(row.need("image"), row.where)),),
            official=text,
            parts={"subject": str(subject)},
        )


SET = BenchmarkSet(
    name="mmk12",
    title="MMK12",
    paper="https://arxiv.org/abs/2503.07365",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/k12",
    senses=("image",),
    read=read,
    means=accuracy,
    deviation="the letter is taken out by rule, where the published task asks a language model",
)
