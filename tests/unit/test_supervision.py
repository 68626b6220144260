"""Budgets, stalls, orders to stop, and a Redis that is brought back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from avatar_rl.buffer_service.control import Heartbeat
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.services.signals import Stopped, StopSignals
from avatar_rl.cluster.workers.supervision import (
    ActorProcess,
    RedisWatch,
    RestartBudget,
    StallWatch,
    StartWatch,
)
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

    def look(progress: int, holds: bool = True) -> dict[str, str]:
        beat = Heartbeat(progress, int(clock.now * 1000))
        return watch.stalled(["rollout-0"], {"rollout/rollout-0": beat}, lambda _: holds)

    assert look(5) == {}
    clock.now += 9
    assert look(6) == {}  # moved
    clock.now += 9
    assert look(6) == {}
    clock.now += 2
    found = look(6)  # it beats, but stands still
    assert "no progress for 11 s" in found["rollout-0"]
    watch.forget("rollout-0")
    assert look(6) == {}


def test_an_idle_actor_is_not_stalled_while_it_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), StallWatch(10)
    for _ in range(30):
        clock.now += 5
        beats = {"rollout/rollout-0": Heartbeat(7, int(clock.now * 1000))}
        assert watch.stalled(["rollout-0"], beats, lambda _: False) == {}


@pytest.mark.parametrize(
    ("beat_s", "look_s"), [(1.0, 2.0), (1.003, 2.0), (2.0, 1.0), (1.0, 0.999), (3.0, 7.0)]
)
def test_a_healthy_idle_actor_is_never_stalled_whatever_the_periods(
    monkeypatch: pytest.MonkeyPatch, beat_s: float, look_s: float
) -> None:
    """Half an hour of beats and looks of about equal periods: the age at a look hardly changes, and
    it once grew for minutes. Redis' clock is set back by an hour in between."""
    clock, watch = Clock(monkeypatch), StallWatch(20)
    begun = clock.now
    for look in range(1, int(1800 / look_s)):
        clock.now = begun + look * look_s
        beaten = int((clock.now - begun) / beat_s) * beat_s
        stamp = int(beaten * 1000) - (3_600_000 if beaten > 900 else 0)
        beats = {"rollout/rollout-0": Heartbeat(7, stamp)}
        assert watch.stalled(["rollout-0"], beats, lambda _: False) == {}


def test_a_frozen_idle_actor_is_found_soon_after_stall_s(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), StallWatch(20)
    found: dict[str, str] = {}
    begun = clock.now
    while not found:
        clock.now += 2
        beats = {"rollout/rollout-0": Heartbeat(7, int(min(clock.now, begun + 60) * 1000))}
        found = watch.stalled(["rollout-0"], beats, lambda _: False)
    assert 80 < clock.now - begun <= 84 and "no sign of life for 2" in found["rollout-0"]


def test_a_pause_of_redis_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes in which nobody could beat, nor the watch look."""
    clock, watch = Clock(monkeypatch), StallWatch(20)
    beats = {"rollout/rollout-0": Heartbeat(7, 1)}
    assert watch.stalled(["rollout-0"], beats, lambda _: True) == {}
    clock.now += 600
    assert watch.stalled(["rollout-0"], beats, lambda _: True) == {}  # it beats again in a moment


def test_what_happened_while_nobody_looked_is_held_against_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver was busy for minutes; the actor beats all the while."""
    clock, watch = Clock(monkeypatch), StallWatch(60)

    def look(holds: bool) -> dict[str, str]:
        beat = Heartbeat(7, int(clock.now * 1000))
        return watch.stalled(["rollout-0"], {"rollout/rollout-0": beat}, lambda _: holds)

    assert look(holds=False) == {}
    clock.now += 300
    assert look(holds=True) == {}  # idle all the while, and just given work
    for _ in range(24):
        clock.now += 2
        assert look(holds=True) == {}
    clock.now += 3
    assert "no progress for 61 s" in look(holds=True)["rollout-0"]


def test_silence_is_a_stall_whatever_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), StallWatch(10)
    for _ in range(0, 12):
        beats = {"rollout/rollout-0": Heartbeat(7, 5)}
        found = watch.stalled(["rollout-0"], beats, lambda _: False)
        clock.now += 1
    assert "no sign of life" in found["rollout-0"]
    assert watch.stalled(["rollout-1"], {}, lambda _: True) == {}  # still starting


def test_a_start_without_a_beat_counts_from_its_process_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a place is no silence, nor is time in which nobody looked."""
    clock, killed = Clock(monkeypatch), []
    place: list[ActorProcess | None] = [None]
    watch = StartWatch(dict, 20, lambda _: place[0])
    monkeypatch.setattr(watch, "_kill", lambda process, _: killed.append(process.pid))
    starting: Any = {"rollout/rollout-0": object()}

    def wait(seconds: float) -> None:
        for _ in range(int(seconds / 2.5)):
            clock.now += 2.5
            watch.look(starting)

    wait(200)
    place[0] = ActorProcess(7, True)
    wait(5)
    clock.now += 300  # the driver was busy
    watch.look(starting)
    assert not killed
    wait(10)
    assert killed == [7]


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
