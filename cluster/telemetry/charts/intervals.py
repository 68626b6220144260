"""How sure an accuracy is."""

from __future__ import annotations

from math import sqrt


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of ``n`` (Wilson 1927). It stays within 0 and 1, also for few.

    Exact only of marks that are right or wrong; with marks between it is somewhat too wide."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(max(0.0, share * (1 - share)) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
