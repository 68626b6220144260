"""Memory over time: the slope within lives of different levels, the start and the end of each left
out."""

from __future__ import annotations

import pytest

from benchmarks.footprint import LEAVE_S, SETTLE_S, Footprint


def life(
    level: float, mib_per_h: float, seconds: int, start: float = 0.0
) -> list[tuple[float, float]]:
    """It fills its caches while it settles, grows steadily, and draws a plot at its end."""
    return [
        (
            start + t,
            level + mib_per_h * t / 3600 - max(0.0, SETTLE_S - t) + 100 * (t > seconds - LEAVE_S),
        )
        for t in range(0, seconds, 5)
    ]


def test_the_slope_is_that_within_lives() -> None:
    footprint = Footprint({}, every_s=60)
    footprint._samples[("learner", 1)] = life(500, 36, 400)
    footprint._samples[("learner", 2)] = life(
        900, 36, 700, start=1000
    )  # a larger one later is no growth
    footprint._samples[("driver", 3)] = life(300, 0, 600)
    footprint._samples[("redis", 4)] = life(20, 1e6, 100)  # too short to tell
    found = footprint.figures()
    footprint.close()
    assert found["memory_slope_mib_per_h_learner"] == pytest.approx(36)
    assert found["memory_slope_mib_per_h_driver"] == pytest.approx(0, abs=1e-6)
    assert found["memory_mib_learner"] == pytest.approx(1000 + 36 * 695 / 3600)
    assert found["memory_span_s_learner"] == (375 - SETTLE_S) + (675 - SETTLE_S)
    assert found["memory_longest_s_learner"] == 675 - SETTLE_S
    assert "memory_slope_mib_per_h_redis" not in found and found["memory_mib_redis"] > 20
