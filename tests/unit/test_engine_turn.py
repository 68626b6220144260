"""An engine that shares its device sleeps and wakes, whoever has it when it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from avatar_rl.actors.engine_turn import EngineTurn
from avatar_rl.actors.shared_state import SharedState
from avatar_rl.common.errors import ModelError
from avatar_rl.common.turn_lock import TurnLock


class Engine:
    """Notes which threads put it to sleep and wake it."""

    def __init__(self) -> None:
        self.asleep, self.in_flight = False, 0
        self.threads: list[str] = []
        self.error: Exception | None = None

    def sleep(self) -> None:
        assert not self.in_flight
        if self.error is not None:
            raise self.error
        self.asleep = True
        self.threads.append(threading.current_thread().name)

    def wake(self) -> None:
        self.asleep = False
        self.threads.append(threading.current_thread().name)


class Stage:
    def __init__(self, path: Path) -> None:
        engine: Any = Engine()
        self.engine: Engine = engine
        self.state, self.lock = SharedState(), TurnLock(path, "engine")
        self.lock.take()
        self.turn = EngineTurn(engine, self.state, self.lock)
        self.thread = threading.Thread(target=self.loop, name="engine", daemon=True)

    def loop(self) -> None:
        """As ``Generation.run``."""

        def steps() -> None:
            while self.state.running:
                if self.turn.is_due and not self.engine.in_flight:
                    self.turn.pass_on()
                time.sleep(0.001)

        self.state.guard(steps)

    def start(self) -> None:
        self.turn.loops(True)
        self.thread.start()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "turns")
    yield stage
    stage.state.stop.set()


def test_the_engines_thread_does_it_while_it_works_else_the_one_that_asks(stage: Stage) -> None:
    stage.turn.end()
    assert stage.engine.asleep and not stage.lock.held
    stage.turn.begin()
    assert not stage.engine.asleep and stage.lock.held
    assert stage.engine.threads == [threading.current_thread().name] * 2
    stage.start()
    stage.turn.end()
    assert stage.engine.asleep and not stage.lock.held
    stage.turn.begin()
    assert stage.lock.held and stage.engine.threads[2:] == ["engine"] * 2


def test_it_waits_until_nothing_is_in_flight(stage: Stage) -> None:
    stage.start()
    stage.engine.in_flight = 1
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(stage.turn.end)
        time.sleep(0.1)
        assert not ended.done() and not stage.engine.asleep and stage.lock.held
        stage.engine.in_flight = 0
        ended.result(5)
    assert stage.engine.asleep


def test_an_engine_that_was_put_to_sleep_before_its_thread_began_is_woken_by_it(
    stage: Stage,
) -> None:
    stage.turn.end()
    stage.turn.loops(True)  # the thread comes later than the next turn
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(stage.turn.begin)
        time.sleep(0.1)
        stage.thread.start()
        begun.result(5)
    assert not stage.engine.asleep and stage.engine.threads[-1] == "engine"


def test_what_breaks_the_engine_is_told_to_the_one_that_asks(stage: Stage) -> None:
    stage.engine.error = ModelError("no memory")
    stage.start()
    with pytest.raises(ModelError, match="no memory"):
        stage.turn.end()


def test_an_actor_that_stops_in_the_learners_turn_ends_its_loop(stage: Stage) -> None:
    stage.start()
    stage.turn.end()
    stage.state.stop.set()
    stage.thread.join(5)
    assert not stage.thread.is_alive() and stage.engine.asleep
