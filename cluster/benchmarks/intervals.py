"""How sure a benchmark's figure is, and whether two checkpoints differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
FLIPS = 10_000
_NOTHING = 1e-15  # squares below it are rounding
_AT_ONCE = 1 << 20  # numbers of a block of resamples: 8 MiB

Scores = Sequence[float] | NDArray[np.float64]
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Figure of b minus figure of a over the same questions."""

    value: float
    interval: Interval
    p_value: float  # two-sided, of a paired sign-flip test

    @property
    def significant(self) -> bool:
        return self.p_value < 0.05


@dataclass(frozen=True)
class Groups:
    """What a figure is made of: the mean of each group of scores, times the group's weight.

    One group is a plain mean; a mean over tasks has a group for each task."""

    of: NDArray[np.int64]  # (n,) group of each score, from 0
    weights: _Array  # (G,) of the groups; they add up to 1

    @classmethod
    def one(cls, scores: int) -> Groups:
        return cls(np.zeros(scores, np.int64), np.ones(1))


def bootstrap(
    scores: Scores,
    *,
    clusters: Sequence[str] | None = None,
    groups: Groups | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """95 % interval of a figure of ``scores``: a bootstrap-t over questions.

    Args:
        clusters: questions of one name (of one video, say) are drawn together, since they are not
            independent.
        groups: what the figure is; it is made anew of every resample. None: the mean.
        seed: of the resampling; equal scores and seeds give equal intervals.

    Where the scores of each group are equal no resample differs: Wilson's interval stands in.
    (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5.)"""
    values = np.asarray(scores, np.float64)
    if not len(values):
        return Interval(0.0, 1.0)
    table = _Table.of(values, clusters, groups or Groups.one(len(values)))
    n = len(table.sums)
    [estimate], [spread], [by_group] = table.figures(np.ones((1, n)))
    if n < 2 or spread**2 <= _NOTHING:
        return wilson(float(estimate), n)
    studentised = np.concatenate(
        [
            _studentised(table, counts, estimate, by_group)
            for counts in _resamples(n, resamples, seed)
        ]
    )
    high, low = np.quantile(studentised, [0.025, 0.975])
    spread = np.sqrt(spread**2 + table.unknown())
    return Interval(
        float(max(min(estimate - low * spread, estimate), min(0.0, values.min()))),
        float(min(max(estimate - high * spread, estimate), max(1.0, values.max()))),
    )


def _studentised(table: _Table, counts: _Array, estimate: float, by_group: _Array) -> _Array:
    """(B,) how many of its own errors each resample is off by. Where a group's scores are equal in
    a resample it has no error there: it takes the sample's, ``by_group``."""
    figures, errors, own = table.figures(counts)
    lacking = np.where(own > _NOTHING, 0.0, by_group).sum(1)
    found: _Array = (figures - estimate) / np.sqrt(errors**2 + lacking)
    return found


def _resamples(n: int, resamples: int, seed: int) -> Iterator[_Array]:
    """(B, n) how often each of ``n`` clusters is drawn, in blocks."""
    random = np.random.default_rng(seed)
    block = max(1, _AT_ONCE // n)
    for first in range(0, resamples, block):
        rows = min(block, resamples - first)
        drawn = random.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


@dataclass(frozen=True)
class _Table:
    """Sum and number of the scores by cluster and group, both (n, G)."""

    sums: _Array
    sizes: _Array
    weights: _Array  # (G,)

    @classmethod
    def of(cls, values: _Array, clusters: Sequence[str] | None, groups: Groups) -> _Table:
        n = len(values)
        rows = np.arange(n)
        if clusters is not None:
            _, rows = np.unique(np.asarray(clusters), return_inverse=True)
            n = int(rows.max()) + 1
        shape = (n, len(groups.weights))
        places = rows * shape[1] + groups.of
        sums = np.bincount(places, values, minlength=n * shape[1]).reshape(shape)
        sizes = np.bincount(places, minlength=n * shape[1]).reshape(shape)
        return cls(sums.astype(np.float64), sizes.astype(np.float64), groups.weights)

    def unknown(self) -> float:
        """What the square of the error lacks: a group of one cluster does not say how its scores
        spread, so it counts with the widest spread that a score in [0, 1] can have."""
        alone = (self.sizes > 0).sum(0) == 1
        return float((self.weights[alone] ** 2).sum() / 4) if len(self.weights) > 1 else 0.0

    def figures(self, counts: _Array) -> tuple[_Array, _Array, _Array]:
        """Of each row of ``counts`` (B, n): the figure (B,), its standard error (B,), and what each
        group alone adds to the square of that (B, G).

        A group that a resample has nothing of is left out, as the metric leaves it out."""
        sizes = counts @ self.sizes
        means = (counts @ self.sums) / np.maximum(sizes, 1)
        weights = self.weights * (sizes > 0)
        weights /= weights.sum(1, keepdims=True)
        each = weights / np.maximum(sizes, 1)  # of one score
        residual = each @ self.sums.T - (each * means) @ self.sizes.T
        n = counts.shape[1]
        scale = n / max(1, n - 1)
        squares = counts @ self.sums**2 - 2 * means * (counts @ (self.sums * self.sizes))
        squares += means**2 * (counts @ self.sizes**2)
        figure, error = (weights * means).sum(1), np.sqrt(scale * (counts * residual**2).sum(1))
        return figure, error, scale * each**2 * squares


def wilson(share: float, n: int) -> Interval:
    """Wilson's score interval of a share among ``n`` (Wilson, 1927)."""
    if n == 0:
        return Interval(0.0, 1.0)
    z = 1.959964
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Interval(float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def paired(
    a: Scores,
    b: Scores,
    *,
    clusters: Sequence[str] | None = None,
    groups: Groups | None = None,
    seed: int = 0,
) -> Difference:
    """Whether b does better than a on the same questions, in the same order.

    ``groups`` says what the figure is, as in ``bootstrap``. The test flips the sign of each
    question's (or cluster's) part of the difference at random, as it may be where the two are
    alike. Raises ValueError where the lengths differ."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} scores against {len(b)}: the questions must be the same")
    differences = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    if not len(differences):
        return Difference(0.0, Interval(0.0, 0.0), 1.0)
    table = _Table.of(differences, clusters, groups or Groups.one(len(differences)))
    [value], [spread], _ = table.figures(np.ones((1, len(table.sums))))
    parts = table.sums @ (table.weights / table.sizes.sum(0))  # they add up to ``value``
    random = np.random.default_rng(seed)
    reached = 0
    for first in range(0, FLIPS, block := max(1, _AT_ONCE // len(parts))):
        signs = random.choice((-1.0, 1.0), (min(block, FLIPS - first), len(parts)))
        reached += int((np.abs(signs @ parts) >= abs(value) - 1e-12).sum())
    half = 1.959964 * float(spread)
    return Difference(
        float(value),
        Interval(float(value) - half, float(value) + half),
        (1 + reached) / (1 + FLIPS),
    )
