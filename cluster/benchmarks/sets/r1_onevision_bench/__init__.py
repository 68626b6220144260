"""R1-Onevision-Bench: school and university questions with a figure; 938 questions."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import LETTER_ONLY, gold_letter, image, joined
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.prompts.choices import lettered


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows with a base64 picture; ``choices`` is a list, its text, or empty."""
    for row in folder.rows("data/*.parquet", "*.parquet", "*.jsonl"):
        options = _options(row)
        text = row.text("question").replace("<image>", "").strip()
        yield Question(
            id=row.text("index"),
            text=text,
            answer=gold_letter(row, options, "answer") if options else row.text("answer"),
            kind="choice" if options else "number",
            options=options,
            media=(image(folder.embedded(row.need("image"), row.where)),),
            official=joined(text, *options, LETTER_ONLY if options else ""),
            parts={"level": str(row.get("level")), "category": str(row.get("category"))},
        )


def _options(row: SetRow) -> tuple[str, ...]:
    given = row.get("choices")
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            given = [line for line in given.splitlines() if line.strip()]
    if not isinstance(given, list) or len(given) < 2:
        return ()
    return lettered([str(one) for one in given])


SET = BenchmarkSet(
    name="r1_onevision_bench",
    title="R1-Onevision-Bench",
    paper="https://arxiv.org/abs/2503.10615",
    layout="https://github.com/wuxu0119/r1-onevision-robustness-study",
    senses=("image",),
    read=read,
    metric=accuracy,
    deviation="the layout is that of a published study's reader, not of the authors; open answers "
    "are compared as numbers or words",
)
