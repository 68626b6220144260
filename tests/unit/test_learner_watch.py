"""A learner that hangs is told from one that works, waits or is dead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from avatar_rl.cluster.workers import supervision
from avatar_rl.cluster.workers.supervision import LearnerWatch

ASK_EVERY_S = LearnerWatch.ASK_EVERY_S


class Rank:
    """Answers at once with what it is told to say; None: not at all."""

    def __init__(self) -> None:
        self.moves: int | None = 0
        self.progress = SimpleNamespace(remote=lambda: self)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    def get(rank: Any) -> dict[str, Any]:
        if rank.moves < 0:
            raise ray.exceptions.RayActorError
        return {"moves": rank.moves, "host": "here", "pid": 1}

    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now.value)
    monkeypatch.setattr(
        ray, "wait", lambda asked, timeout: (asked if asked[0].moves is not None else [], [])
    )
    monkeypatch.setattr(ray, "get", get)
    return now


def looks(
    watch: LearnerWatch, clock: SimpleNamespace, seconds: float, moving: Rank | None = None
) -> list[str]:
    """What is found over some seconds, while a rank moves."""
    found = []
    for _ in range(round(seconds / ASK_EVERY_S)):
        clock.value += ASK_EVERY_S
        if moving is not None and moving.moves is not None:
            moving.moves += 1
        if (reason := watch.look()) is not None:
            found.append(reason)
    return found


def test_one_rank_that_moves_keeps_the_others_from_blame(clock: SimpleNamespace) -> None:
    ranks = [Rank(), Rank()]
    watch = LearnerWatch(ranks, 10)
    assert looks(watch, clock, 60, moving=ranks[1]) == []
    assert "no rank has got anywhere for 12 s" in looks(watch, clock, 20)[0]


def test_one_that_does_not_answer_is_stopped_whatever_the_others_do(clock: SimpleNamespace) -> None:
    ranks = [Rank(), Rank()]
    watch = LearnerWatch(ranks, 10)
    assert looks(watch, clock, 20, moving=ranks[0]) == []
    ranks[1].moves = None
    found = looks(watch, clock, 20, moving=ranks[0])
    assert "rank 1 has given no sign of life for 12 s" in found[0]


def test_a_dead_rank_is_nobodys_hang(clock: SimpleNamespace) -> None:
    ranks = [Rank()]
    watch = LearnerWatch(ranks, 10)
    looks(watch, clock, 4, moving=ranks[0])
    ranks[0].moves = -1
    assert looks(watch, clock, 8) == []
