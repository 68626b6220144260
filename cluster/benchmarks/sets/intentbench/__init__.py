"""IntentBench: why people act as they do, from video and sound; 2,689 questions of four kinds."""

from __future__ import annotations

import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, image, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Kind, Question
from avatar_rl.common.errors import InputError

_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_WITHIN = "within the <answer> </answer> tags."
#: Problem types of the file -> our kind, and how the authors ask for the answer.
_KINDS: dict[str, tuple[Kind, str]] = {
    "multiple choice": (
        "choice",
        f"Please provide only the single option letter (e.g., A, B, C, D, etc.) {_WITHIN}",
    ),
    "emer_ov_mc": (
        "choices",
        "Please provide only the single or multiple option letter (e.g., A for single option or "
        f"A,E for multi option, etc.) {_WITHIN}",
    ),
    "judge": ("yes_no", f"Please answer Yes or No {_WITHIN}"),
    "numerical": ("number", f"Please provide the numerical value (e.g., 42 or 3.14) {_WITHIN}"),
    "regression": ("relative", f"Please provide the numerical value (e.g., 42 or 3.14) {_WITHIN}"),
}


def read(folder: SetFolder) -> Iterator[Question]:
    """qa.json beside videos/; the truth stands in answer tags in ``solution``."""
    for number, row in enumerate(folder.rows("qa.json")):
        problem = row.text("problem_type")
        if problem not in _KINDS:
            raise InputError(
                row.where, f"problem_type {problem!r} is none of {list(_KINDS)}", "correct the row"
            )
        kind, ask = _KINDS[problem]
        options = options_of(row, "options") if kind in ("choice", "choices") else ()
        name = row.text("video", "path")
        make = image if row.get("data_type") == "image" else video
        text = row.text("problem")
        yield Question(
            id=str(row.get("qid") or f"{name}-{number}"),
            text=text,
            answer=_truth(row, kind, options),
            kind=kind,
            options=options,
            media=(make(folder.find(f"videos/{name}", name)),),
            official=joined(f"{text} Options:" if options else text, *options, ask),
            parts={"type": row.text("Type", "data_source", "problem_type")},
        )


def _truth(row: SetRow, kind: Kind, options: tuple[str, ...]) -> str:
    solution = row.text("solution")
    match = _TAGGED.search(solution)
    found = SetRow({"solution": match[1] if match else solution}, row.where)
    if kind == "choice":
        return gold_letter(found, options, "solution")
    if kind == "choices":
        given = [part.strip() for part in found.text("solution").split(",")]
        each = [SetRow({"solution": part}, row.where) for part in given]
        return ",".join(sorted({gold_letter(one, options, "solution") for one in each}))
    return found.text("solution")


SET = BenchmarkSet(
    name="intentbench",
    title="IntentBench",
    paper="https://arxiv.org/abs/2506.21277",
    layout="https://github.com/HumanMLLM/HumanOmniV2",
    senses=("video", "audio"),
    read=read,
    means=accuracy,
    deviation="a number is compared by value: the authors also want a decimal point where the "
    "truth has one",
    listens=True,
)
