"""R1-Onevision-Bench: school and university questions with a figure; 942 rows, one without an
answer. One file, r1-onevision.tsv, of the dataset Fancy-MLLM/R1-Onevision-Bench that its authors'
repository names; the columns are those that its published readers take."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, image, joined
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.prompts.choices import lettered

#: An option in a line of several: "(A) red (B) green", "A. red B. green".
_INLINE = re.compile(r"\(?([A-H])[.:)]\s*(.+?)(?=\s+\(?[A-H][.:)]\s|\s*\Z)", re.DOTALL)
_CHOICES = re.compile(r"\n\s*(?:choices|options)\s*:.*\Z", re.IGNORECASE | re.DOTALL)


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows with a base64 picture. ``question`` holds hint, question and choices as they are asked;
    ``choices`` is empty where the answer is open."""
    for row in folder.rows("r1-onevision.tsv", "*.tsv", "data/*.parquet", "*.parquet", "*.jsonl"):
        if row.get("answer") is None:
            continue  # nothing to compare with
        options, asked = _options(row), row.text("question").replace("<image>", "").strip()
        text = asked.rpartition("Question:")[2].strip()
        listed = "" if not options or _CHOICES.search(asked) else "Choices:"
        yield Question(
            id=row.text("index"),
            text=_CHOICES.sub("", text).strip() if options else text,
            answer=gold_letter(row, options, "answer") if options else row.text("answer"),
            kind="choice" if options else "number",
            options=options,
            media=(image(folder.embedded(row.need("image"), row.where)),),
            official=joined(asked, listed, *(options if listed else ())),
            parts={"level": str(row.get("level")), "category": str(row.get("category"))},
        )


def _options(row: SetRow) -> tuple[str, ...]:
    given = row.get("choices")
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            lines = [line.strip() for line in given.splitlines() if line.strip()]
            if len(lines) == 1:
                lines = [f"{letter}. {words.strip()}" for letter, words in _INLINE.findall(given)]
            given = [re.sub(r"^\(?([A-H])[.:)]\s*", r"\1. ", line) for line in lines]
    if not isinstance(given, list) or len(given) < 2:
        return ()
    return lettered([str(one) for one in given])


SET = BenchmarkSet(
    name="r1_onevision_bench",
    title="R1-Onevision-Bench",
    paper="https://arxiv.org/abs/2503.10615",
    layout="https://github.com/Fancy-MLLM/R1-Onevision",
    senses=("image",),
    read=read,
    means=accuracy,
    deviation="letters and open answers are compared by rule, where the authors ask a language "
    "model; the row without an answer is left out",
)
