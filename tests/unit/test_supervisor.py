"""Checkpoints are of one moment, however slowly they are written, and an order to stop is answered
in time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from avatar_rl.cluster.checkpoints.checkpoint import checkpoints, read_checkpoint
from avatar_rl.cluster.services.signals import Stopped, StopSignals
from avatar_rl.cluster.training.supervisor import Origin, Supervisor
from avatar_rl.cluster.workers.supervision import RestartBudget
from avatar_rl.learner.state_replica import write_files


class Ranks:
    """A learner whose state nobody holds: captured by the ranks themselves, one copy at a time."""

    def __init__(self) -> None:
        self.captured = np.zeros(0, dtype=np.uint8)

    def held(self, version: int) -> bool:
        return True

    def writer(self, version: int) -> Callable[[Path], dict[str, Any]]:
        self.captured = np.full(10, version, dtype=np.uint8)
        return lambda folder: write_files({"model.pt": self.captured}, folder)


class Buffer:
    """A replay buffer whose snapshots take until ``release``."""

    def __init__(self) -> None:
        self.at, self.release = 0, threading.Event()
        self.replay = self.stats = self

    def version(self) -> int:
        return self.at

    def new_fencing_token(self) -> None: ...

    def read(self) -> SimpleNamespace:
        return SimpleNamespace(version=self.at, trained_step=self.at - 1)

    def snapshot(self, path: Path, fixed: Callable[[], None]) -> None:
        path.write_bytes(bytes([self.at]))
        fixed()
        assert self.release.wait(30)


@contextmanager
def released_at_last(buffer: Buffer) -> Iterator[None]:
    """A wait for ``buffer`` that should not be ends after 10 s: a fault fails and does not hang."""
    timer = threading.Timer(10.0, buffer.release.set)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()  # the interpreter would wait for it at its end


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    (tmp_path / "metrics.jsonl").touch()
    config: Any = SimpleNamespace(
        supervision=SimpleNamespace(restarts=1, stall_s=60.0, grace_s=1.0),
        checkpoint=SimpleNamespace(keep=3, every=20),
        loop=SimpleNamespace(steps=100),
        rewards=SimpleNamespace(asks_judge=False),
        weights=SimpleNamespace(transport="board"),
    )
    events: list[tuple[str, str]] = []
    folder: Any = SimpleNamespace(
        path=tmp_path, event=lambda kind, message: events.append((kind, message)), all=events
    )
    lock: Any = SimpleNamespace(run_id="run-1")
    screen: Any = SimpleNamespace(event=lambda message: None)
    buffer: Any = Buffer()
    fleet: Any = SimpleNamespace(budget=RestartBudget(1, "rollout actors"))
    learner: Any = Ranks()
    return Supervisor(
        config,
        folder=folder,
        screen=screen,
        lock=lock,
        signals=StopSignals(),
        redis=None,
        buffer=buffer,
        fleet=fleet,
        learner=learner,
        rounds={},
        accuracies=[],
        origin=Origin("model", "data"),
    )


def test_a_slow_checkpoint_keeps_the_state_of_its_own_step(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    buffer: Any = supervisor.buffer
    buffer.at = 1
    supervisor.begin_checkpoint(1)  # its snapshot is on its way; the learner's part comes after it
    buffer.at = 2
    threading.Timer(0.3, buffer.release.set).start()
    supervisor.begin_checkpoint(2)
    supervisor.checkpoints.wait()
    for path, step in zip(checkpoints(tmp_path), (2, 1), strict=True):
        checkpoint = read_checkpoint(path)
        assert (checkpoint.step, checkpoint.version) == (step, step)
        assert checkpoint.buffer.read_bytes() == bytes([step])
        assert (checkpoint.learner / "state" / "model.pt").read_bytes() == bytes([step] * 10)


def test_a_checkpoint_that_takes_too_long_does_not_hold_up_an_order_to_stop(
    supervisor: Supervisor,
) -> None:
    buffer: Any = supervisor.buffer
    folder: Any = supervisor.folder
    buffer.at = 1
    supervisor.begin_checkpoint(1)
    buffer.at = 2
    supervisor.signals.asked, supervisor.signals.asked_at = signal.SIGTERM, time.monotonic()
    with released_at_last(buffer):
        supervisor.save_last()
    assert not buffer.release.is_set(), "it was waited for"
    assert folder.all[-1][0] == "checkpoint left out"
    buffer.release.set()
    supervisor.checkpoints.wait()


def test_an_order_to_stop_is_heard_while_a_step_waits_for_the_checkpoint_before(
    supervisor: Supervisor,
) -> None:
    buffer: Any = supervisor.buffer
    buffer.at = 20
    supervisor.checkpoint(20)
    buffer.at = 40

    def ask() -> None:
        supervisor.signals.asked, supervisor.signals.asked_at = signal.SIGTERM, time.monotonic()

    threading.Timer(0.3, ask).start()
    with released_at_last(buffer), pytest.raises(Stopped):
        supervisor.checkpoint(40)
    assert not buffer.release.is_set(), "it was waited for"
    buffer.release.set()
    supervisor.checkpoints.wait()


def test_a_checkpoint_is_taken_when_due_and_after_the_last_step_however_early(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    buffer: Any = supervisor.buffer
    buffer.release.set()
    for step, last in ((19, False), (20, False), (21, False), (22, True)):
        buffer.at = step
        supervisor.checkpoint(step, last=last)
    supervisor.checkpoints.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000022", "step-000020"]
