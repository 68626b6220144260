"""Learning-rate schedules as pure functions of the update number."""

from __future__ import annotations

import math

from avatar_rl.learner.config import Schedule


def lr_at(
    update: int, *, lr: float, warmup: int, total: int, schedule: Schedule, floor: float = 0.0
) -> float:
    """Rate of update ``update`` (0-based) of ``total``: linear warm-up from lr/warmup, then the
    schedule down to ``floor * lr`` at the last update."""
    if update < warmup:
        return lr * (update + 1) / warmup
    if schedule == "constant" or total <= warmup + 1:
        return lr
    progress = min(1.0, (update - warmup) / (total - warmup - 1))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return lr * (floor + (1 - floor) * left)
