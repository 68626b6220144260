"""The figures that benchmarks report, from marked answers. All in [0, 1], but for errors.

A mean is given as its groups and their weights (``Weighed``), so that the figure, its interval and
a test of its change are of one and the same number."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from avatar_rl.cluster.benchmarks.intervals import Difference, Groups, Interval, bootstrap, paired
from avatar_rl.cluster.benchmarks.record import Marked, Means, Weighed


def by_part(marked: Sequence[Marked], part: str) -> dict[str, list[Marked]]:
    """The answers by the value of a part of their questions; one of several values counts in
    each."""
    found: dict[str, list[Marked]] = defaultdict(list)
    for one in marked:
        value = one.question.parts.get(part)
        for name in () if value is None else (value,) if isinstance(value, str) else value:
            found[name].append(one)
    return dict(sorted(found.items()))


def equal(marked: Sequence[Marked]) -> Weighed:
    """Every question counts alike."""
    return [(1.0, marked)] if marked else []


def mean_of(parts: Sequence[Weighed]) -> Weighed:
    """Every one of ``parts`` counts alike, however many questions it has."""
    return [(weight / len(parts), group) for one in parts for weight, group in one]


def parts_of(marked: Sequence[Marked]) -> dict[str, Weighed]:
    """ "task/Hallucination" -> its answers, for every part that the questions have, in their
    order."""
    names = dict.fromkeys(name for one in marked for name in one.question.parts)
    return {
        f"{name}/{value}": equal(of_value)
        for name in names
        for value, of_value in by_part(marked, name).items()
    }


def accuracy(marked: Sequence[Marked]) -> dict[str, Weighed]:
    """The mean over all questions, then by part."""
    return {"accuracy": equal(marked)} | parts_of(marked)


def macro(part: str) -> Means:
    """The mean of the means by ``part``, each of equal weight; then by part."""

    def means(marked: Sequence[Marked]) -> dict[str, Weighed]:
        parts = [equal(of_value) for of_value in by_part(marked, part).values()]
        return {"accuracy": mean_of(parts)} | parts_of(marked)

    return means


def count_errors(marked: Sequence[Marked]) -> dict[str, float]:
    """Of counts: off-by-one accuracy, and the mean and root mean square error.

    CG-AV-Counting (arXiv 2506.05328) caps an error beyond max(2 x truth, 100) at 2 x truth, and
    takes no answer for 0."""
    errors = []
    for one in marked:
        truth = float(one.question.answer)
        error = abs(truth - float(one.given or 0.0))
        errors.append((error, error if error <= max(2 * truth, 100) else abs(2 * truth)))
    if not errors:
        return {}
    return {
        "off_by_one": fmean(float(error <= 1) for error, _ in errors),
        "mean_absolute_error": fmean(capped for _, capped in errors),
        "root_mean_square_error": math.sqrt(fmean(capped**2 for _, capped in errors)),
    }


def interval_of(weighed: Weighed) -> Interval:
    """95 % of a figure; questions about one file are drawn together."""
    answers = _answers(weighed)
    return bootstrap(
        [one.score for one in answers],
        clusters=[one.question.cluster for one in answers],
        groups=_groups(weighed),
    )


def change(before: Weighed, after: Weighed) -> Difference:
    """Of two checkpoints' figures over the same questions, group by group in the same order.

    Raises ValueError where the questions differ."""
    first, second = _answers(before), _answers(after)
    if [one.question.id for one in first] != [one.question.id for one in second]:
        raise ValueError("a change needs the same questions in the same order")
    return paired(
        [one.score for one in first],
        [one.score for one in second],
        clusters=[one.question.cluster for one in first],
        groups=_groups(before),
    )


def _answers(weighed: Weighed) -> list[Marked]:
    return [one for _, group in weighed for one in group]


def _groups(weighed: Weighed) -> Groups:
    sizes = [len(group) for _, group in weighed]
    return Groups(
        np.repeat(np.arange(len(sizes)), sizes), np.asarray([weight for weight, _ in weighed])
    )
