"""Learning rates by hand."""

from __future__ import annotations

import pytest
import torch

from avatar_rl.learner.config import Schedule
from avatar_rl.learner.engine import lr_at


def rates(
    schedule: Schedule, *, warmup: int, total: int, floor: float = 0.0, lr: float = 2.0
) -> list[float]:
    return [
        lr_at(u, lr=lr, warmup=warmup, total=total, schedule=schedule, floor=floor)
        for u in range(total)
    ]


def test_warm_up_then_constant() -> None:
    assert rates("constant", warmup=4, total=7) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert rates("constant", warmup=0, total=3) == [2.0, 2.0, 2.0]


def test_linear_falls_from_the_peak_to_the_floor_at_the_last_update() -> None:
    assert rates("linear", warmup=2, total=7) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates("linear", warmup=2, total=7, floor=0.5) == pytest.approx(
        [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0]
    )


def test_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.2)
    expected = []
    for _ in range(9):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates("cosine", warmup=0, total=9, floor=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_edges_neither_divide_by_zero_nor_exceed_the_peak(schedule: Schedule) -> None:
    assert rates(schedule, warmup=1, total=1) == [2.0]
    assert rates(schedule, warmup=0, total=1) == [2.0]
    assert rates(schedule, warmup=1, total=2) == [2.0, 2.0]
    # A resumed run may ask past its last update: the rate stays where it ended.
    late = lr_at(99, lr=2.0, warmup=2, total=10, schedule=schedule, floor=0.25)
    assert late == pytest.approx(2.0 if schedule == "constant" else 0.5)
