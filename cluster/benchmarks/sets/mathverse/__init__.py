"""MathVerse testmini: each problem in six versions, from all in words to all in the picture; 3,940
questions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, image
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

_OPTION = re.compile(r"^\s*\(?([A-H])[:.)]\s*(.+?)\s*$", re.MULTILINE)


def read(folder: SetFolder) -> Iterator[Question]:
    """testmini rows; options are lines "A: ..." of the question."""
    for row in folder.rows("data/testmini*.parquet", "testmini*.parquet", "testmini*.json"):
        several = row.text("question_type") == "multi-choice"
        asked = row.text("question_for_eval", "question")
        options = _options(asked) if several else ()
        picture = row.get("image")
        about = row.get("metadata")
        subject = about.get("subject") if isinstance(about, dict) else None
        yield Question(
            id=row.text("sample_index"),
            text=_OPTION.sub("", row.text("question")).replace("Choices:", "").strip()
            or "Answer the question in the picture.",
            answer=_truth(row, options),
            kind="choice" if options else "number",
            options=options,
            media=(image(folder.embedded(picture, row.where)),) if picture else (),
            official=row.text("query_wo"),
            parts={"version": row.text("problem_version"), "subject": str(subject)},
        )


def _options(question: str) -> tuple[str, ...]:
    return tuple(f"{letter}. {words}" for letter, words in _OPTION.findall(question))


def _truth(row: SetRow, options: tuple[str, ...]) -> str:
    return gold_letter(row, options, "answer") if options else row.text("answer")


SET = BenchmarkSet(
    name="mathverse",
    title="MathVerse",
    paper="https://arxiv.org/abs/2403.14624",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/mathverse",
    senses=("image",),
    read=read,
    means=accuracy,
    deviation="answers are compared by rule; the authors let a language model extract and judge",
)
