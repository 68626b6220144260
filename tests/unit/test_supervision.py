"""Budgets, stalls, orders to stop, and a Redis that is brought back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from avatar_rl.buffer_service.control import Heartbeat
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.services.signals import Stopped, StopSignals
from avatar_rl.cluster.workers.supervision import RedisWatch, RestartBudget, StallWatch
from avatar_rl.common.errors import ResourceError


def test_a_budget_counts_deaths_between_signs_of_progress() -> None:
    budget = RestartBudget(2, "learner ranks")
    for _ in range(3):
        budget.spend("x")
        budget.spend("x")
        budget.progress()
    budget.spend("x")
    budget.spend("x")
    with pytest.raises(ResourceError, match=r"learner ranks died 3 times .* last: bang"):
        budget.spend("bang")
    assert budget.total == 9


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(
            "avatar_rl.cluster.workers.supervision.time.monotonic", lambda: self.now
        )


def test_an_actor_that_holds_work_and_does_not_move_is_stalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, watch = Clock(monkeypatch), StallWatch(10)

    def look(progress: int, age: float, holds: bool = True) -> dict[str, str]:
        return watch.stalled(
            ["rollout-0"], {"rollout/rollout-0": Heartbeat(progress, age)}, lambda _: holds
        )

    assert look(5, 0.1) == {}
    clock.now += 9
    assert look(6, 0.1) == {}  # moved
    clock.now += 9
    assert look(6, 0.2) == {}
    clock.now += 2
    found = look(6, 0.1)  # it beats, but stands still
    assert "no progress for 11 s" in found["rollout-0"]
    watch.forget("rollout-0")
    assert look(6, 0.1) == {}


def test_an_idle_actor_is_not_stalled_while_it_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), StallWatch(10)
    for number in range(30):
        clock.now += 5
        beats = {"rollout/rollout-0": Heartbeat(7, 0.5 - 0.1 * (number % 2))}
        assert watch.stalled(["rollout-0"], beats, lambda _: False) == {}


def test_what_happened_while_nobody_looked_is_held_against_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver was busy for minutes; a beat is 0 to 1 s old whenever one looks."""
    clock, watch = Clock(monkeypatch), StallWatch(60)

    def look(age: float, holds: bool) -> dict[str, str]:
        return watch.stalled(
            ["rollout-0"], {"rollout/rollout-0": Heartbeat(7, age)}, lambda _: holds
        )

    assert look(0.2, holds=False) == {}
    clock.now += 300
    assert look(0.9, holds=True) == {}  # idle all the while, and just given work
    for _ in range(24):
        clock.now += 2
        assert look(0.5, holds=True) == {}
    clock.now += 3
    assert "no progress for 61 s" in look(0.5, holds=True)["rollout-0"]


def test_silence_is_a_stall_whatever_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), StallWatch(10)
    for seconds in range(0, 12):
        found = watch.stalled(
            ["rollout-0"], {"rollout/rollout-0": Heartbeat(7, float(seconds))}, lambda _: False
        )
        clock.now += 1
    assert "no sign of life" in found["rollout-0"]
    assert watch.stalled(["rollout-1"], {}, lambda _: True) == {}  # still starting


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stops:
        stops.orderly = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.asked == signal.SIGTERM and stops.waited >= 0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert str(Stopped(signal.SIGTERM)) == "stopped by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_while_there_is_nothing_to_save_a_signal_acts_at_once() -> None:
    with StopSignals() as stops:
        with pytest.raises(Stopped, match="SIGTERM"):  # pre-empted: in order
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert not isinstance(caught.value, Stopped) and stops.asked is None


def test_a_killed_redis_comes_back_with_what_it_had(tmp_path: Path) -> None:
    import redis

    said: list[str] = []
    with EmbeddedRedis(tmp_path, appendfsync="always") as server:
        client = redis.Redis(unix_socket_path=str(server.socket))
        client.set("a", "1")
        budget = RestartBudget(1, "redis-server")
        with RedisWatch(server, budget, lambda kind, _: said.append(kind)) as redis_watch:
            for number in range(2):
                pid = server.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + 20
                while (server.pid in (None, pid) or not said) and redis_watch.failure is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                if number == 0:
                    assert client.get("a") == b"1"
        assert said == ["redis restarted"]
        assert redis_watch.failure is not None and "died 2 times" in str(redis_watch.failure)
