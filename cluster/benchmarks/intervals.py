"""How sure a benchmark's figure is, and whether two checkpoints differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of b minus mean of a over the same questions."""

    value: float
    interval: Interval
    p_value: float  # two-sided, of a paired sign-flip test

    @property
    def significant(self) -> bool:
        return self.p_value < 0.05


def bootstrap(
    scores: Sequence[float] | NDArray[np.float64],
    *,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """95 % interval of the mean: a bootstrap-t over questions.

    Args:
        clusters: questions of one name (of one video, say) are drawn together, since they are not
            independent.
        seed: of the resampling; equal scores and seeds give equal intervals.

    Where all scores are equal no resample differs: Wilson's interval stands in. (Efron and
    Tibshirani, An Introduction to the Bootstrap, 12.5.)"""
    values = np.asarray(scores, np.float64)
    if not len(values):
        return Interval(0.0, 1.0)
    sums, sizes = _clustered(values, clusters)
    n, estimate = len(sums), values.mean()
    spread = _standard_error(sums[None], sizes[None])[0]
    if n < 2 or spread == 0:
        return wilson(float(estimate), n)
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    errors = _standard_error(sums[draws], sizes[draws])
    # A resample of equal scores has no error of its own; it takes that of the sample.
    studentised = (means - estimate) / np.where(errors > 0, errors, spread)
    high, low = np.quantile(studentised, [0.025, 0.975])
    return Interval(
        float(max(min(estimate - low * spread, estimate), min(0.0, values.min()))),
        float(min(max(estimate - high * spread, estimate), max(1.0, values.max()))),
    )


def _clustered(
    values: NDArray[np.float64], clusters: Sequence[str] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the scores of each cluster; each score alone without clusters."""
    if clusters is None:
        return values, np.ones_like(values)
    _, of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(of, values).astype(np.float64)
    return sums, np.bincount(of).astype(np.float64)


def _standard_error(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B,) standard error of the ratio sum / size of (B, n) clusters."""
    n = sums.shape[1]
    ratio = sums.sum(1, keepdims=True) / sizes.sum(1, keepdims=True)
    residual = sums - ratio * sizes
    scale = np.sqrt(n / max(1, n - 1)) / sizes.sum(1)
    error: NDArray[np.float64] = scale * np.sqrt((residual**2).sum(1))
    return error


def wilson(share: float, n: int) -> Interval:
    """Wilson's score interval of a share among ``n`` (Wilson, 1927)."""
    if n == 0:
        return Interval(0.0, 1.0)
    z = 1.959964
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Interval(float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def paired(
    a: Sequence[float] | NDArray[np.float64],
    b: Sequence[float] | NDArray[np.float64],
    *,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
) -> Difference:
    """Whether b does better than a on the same questions, in the same order.

    The test flips the sign of each question's (or cluster's) difference at random, as it may be
    where the two are alike. Raises ValueError where the lengths differ."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} scores against {len(b)}: the questions must be the same")
    differences = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    if not len(differences):
        return Difference(0.0, Interval(0.0, 0.0), 1.0)
    sums, sizes = _clustered(differences, clusters)
    observed = abs(sums.sum())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (RESAMPLES * 5, len(sums)))
    reached = np.abs(signs @ sums) >= observed - 1e-12
    value = float(differences.mean())
    spread = float(_standard_error(sums[None], sizes[None])[0])
    half = 1.959964 * spread
    return Difference(
        value, Interval(value - half, value + half), (1 + reached.sum()) / (1 + len(reached))
    )
