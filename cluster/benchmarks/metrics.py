"""The figures that benchmarks report, from marked answers. All in [0, 1], but for errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from avatar_rl.cluster.benchmarks.record import Marked, Metric


def by_part(marked: Sequence[Marked], part: str) -> dict[str, list[Marked]]:
    """The answers by the value of a part of their questions; one of several values counts in
    each."""
    found: dict[str, list[Marked]] = defaultdict(list)
    for one in marked:
        value = one.question.parts.get(part)
        for name in () if value is None else (value,) if isinstance(value, str) else value:
            found[name].append(one)
    return dict(sorted(found.items()))


def mean(marked: Sequence[Marked]) -> float:
    return fmean(one.score for one in marked) if marked else 0.0


def parts_of(marked: Sequence[Marked]) -> dict[str, float]:
    """ "task/Hallucination" -> accuracy, for every part that the questions have."""
    names = sorted({name for one in marked for name in one.question.parts})
    return {
        f"{name}/{value}": mean(of_value)
        for name in names
        for value, of_value in by_part(marked, name).items()
    }


def accuracy(marked: Sequence[Marked]) -> dict[str, float]:
    """The mean over all questions, then by part."""
    return {"accuracy": mean(marked)} | parts_of(marked)


def macro(part: str) -> Metric:
    """The mean of the means by ``part``, each of equal weight; then by part."""

    def metric(marked: Sequence[Marked]) -> dict[str, float]:
        means = [mean(of_value) for of_value in by_part(marked, part).values()]
        return {"accuracy": fmean(means) if means else 0.0} | parts_of(marked)

    return metric


def counting(marked: Sequence[Marked]) -> dict[str, float]:
    """Of counts: accuracy, off-by-one accuracy, and the mean and root mean square error.

    CG-AV-Counting (arXiv 2506.05328) caps an error beyond max(2 x truth, 100) at 2 x truth, and
    takes no answer for 0."""
    errors = []
    for one in marked:
        truth = float(one.question.answer)
        error = abs(truth - float(one.given or 0.0))
        errors.append((error, error if error <= max(2 * truth, 100) else abs(2 * truth)))
    if not errors:
        return {"accuracy": 0.0}
    return {
        "accuracy": fmean(float(error <= 1e-5) for error, _ in errors),
        "off_by_one": fmean(float(error <= 1) for error, _ in errors),
        "mean_absolute_error": fmean(capped for _, capped in errors),
        "root_mean_square_error": math.sqrt(fmean(capped**2 for _, capped in errors)),
    } | parts_of(marked)
