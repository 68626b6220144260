"""Two jobs never share a run; a lock that its holder left behind is broken, and said to be."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.checkpoints.runlock import LOCK, RunLock
from avatar_rl.common.errors import ConfigError

BEAT = 0.02


def a_lock(folder: Path, said: list[str] | None = None) -> RunLock:
    return RunLock(folder, on_warning=(said if said is not None else []).append, beat_s=BEAT)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[RunLock]:
    lock = a_lock(tmp_path)
    lock.acquire()
    yield lock
    lock.release()


def leave_behind(folder: Path, **changes: object) -> None:
    """The lock of a holder that does not beat any more."""
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": 1.0,
        "token": "other",
        "beats": 3,
    }
    (folder / LOCK).write_text(json.dumps({**holder, **changes}))


def test_a_second_job_is_refused_and_told_who_has_the_run(held: RunLock, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"under way as process {os.getpid()} on"):
        a_lock(tmp_path).acquire()


def test_a_released_lock_can_be_taken(tmp_path: Path) -> None:
    for _ in range(2):
        lock = a_lock(tmp_path)
        lock.acquire()
        lock.release()
        lock.release()
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_a_dead_process_is_broken_with_a_message(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in (
        {"pid": gone.pid},
        {"pid": os.getpid(), "started": 1.0},
    ):  # the second: its pid lives on in us
        leave_behind(tmp_path, **changes)
        said: list[str] = []
        lock = a_lock(tmp_path, said)
        lock.acquire()
        lock.release()
        [message] = said
        assert "left behind" in message and str(changes["pid"]) in message


def test_a_silent_lock_of_another_host_is_broken(tmp_path: Path) -> None:
    leave_behind(
        tmp_path, host="elsewhere", started=time.time() + 10**6
    )  # its clock is of no interest
    said: list[str] = []
    lock = a_lock(tmp_path, said)
    lock.acquire()
    lock.release()
    assert len(said) == 1 and "elsewhere" in said[0]


def test_a_beating_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    leave_behind(tmp_path, host="elsewhere")
    stop = threading.Event()

    def beat() -> None:
        beats = 3
        while not stop.wait(BEAT):
            beats += 1
            leave_behind(tmp_path, host="elsewhere", beats=beats)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on elsewhere"):
            a_lock(tmp_path).acquire()
    finally:
        stop.set()
        thread.join()


def test_who_loses_its_lock_learns_it(held: RunLock, tmp_path: Path) -> None:
    leave_behind(tmp_path, host="elsewhere", pid=7)
    deadline = time.monotonic() + 10
    while held.lost is None and time.monotonic() < deadline:
        time.sleep(BEAT)
    assert held.lost == "process 7 on elsewhere"
    held.release()
    assert (tmp_path / LOCK).exists()  # it is not ours to remove


def test_storage_that_fails_for_a_moment_takes_no_lock_away(
    held: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, failed = Path.read_text, []

    def stale(path: Path, *arguments: Any, **named: Any) -> str:
        if path.name == LOCK and len(failed) < 3:
            failed.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", stale)
    beats, deadline = held._beats, time.monotonic() + 10
    while held._beats < beats + 6 and held.lost is None and time.monotonic() < deadline:
        time.sleep(BEAT)
    assert len(failed) == 3 and held.lost is None


def test_one_of_many_contenders_gets_it(tmp_path: Path) -> None:
    leave_behind(tmp_path, pid=2**22 + 1)
    locks, winners = [a_lock(tmp_path) for _ in range(8)], []

    def contend(lock: RunLock) -> None:
        try:
            lock.acquire()
            winners.append(lock)
        except ConfigError:
            pass

    threads = [threading.Thread(target=contend, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    winners[0].release()


def test_in_redis_too_there_is_one_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs that share Redis but no disk: the folders differ, the run's name does not."""
    monkeypatch.setattr("avatar_rl.cluster.checkpoints.runlock.SILENCE_S", 0.4)
    folders = [tmp_path / name / "run-1" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    with EmbeddedRedis(tmp_path / "redis") as server:
        first, second = (a_lock(folder) for folder in folders)
        first.acquire()
        first.acquire_redis(BufferConfig(), server.url)
        second.acquire()
        with pytest.raises(ConfigError, match=f"held by process {os.getpid()}"):
            second.acquire_redis(BufferConfig(), server.url)
        assert first._thread is not None
        first._stop.set()  # it dies: nobody renews the key
        first._thread.join()
        second.acquire_redis(BufferConfig(), server.url)
        first.release()
        assert server.pid is not None
        second.release()
