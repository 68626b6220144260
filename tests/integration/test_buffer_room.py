"""A Redis that has no room for a moment: the call waits, says so, and nothing is lost."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from avatar_rl.buffer_service.config import AppendFsync
from avatar_rl.buffer_service.errors import BufferFullError
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.redis.connection import pauses_told
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.services.signals import Stopped
from avatar_rl.cluster.workers.supervision import PauseReport, RedisWatch, RestartBudget
from tests.buffer_records import CONFIG, make_group, run_step

PAUSED_S = 1.5
Fault = tuple[Callable[[], object], Callable[[], object]]  # take the room, give it back


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis", appendfsync="everysec") as server:
        yield server


def out_of_memory(client: redis.Redis, folder: Path) -> Fault:
    def give() -> None:
        client.config_set("maxmemory", 0)

    return lambda: client.config_set("maxmemory", 1), give


def nearly_out_of_memory(client: redis.Redis, folder: Path) -> Fault:
    """Above buffer.memory_limit, so that we stop before Redis does."""

    def take() -> None:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.5))

    return take, lambda: client.config_set("maxmemory", 0)


def disk_full(client: redis.Redis, folder: Path) -> Fault:
    """Redis stops taking writes as it does on a full disk: its last save to disk has failed."""

    def saved(status: str) -> None:
        deadline = time.monotonic() + 30
        while client.info("persistence")["rdb_last_bgsave_status"] != status:
            assert time.monotonic() < deadline
            with suppress(redis.exceptions.ResponseError):  # one is under way
                client.bgsave()
            time.sleep(0.1)

    def take() -> None:
        (folder / "dump.rdb").mkdir()  # no file can be renamed to it, whoever runs Redis
        (folder / "dump.rdb" / "full").touch()
        client.config_set("save", "3600 1000000")
        saved("err")

    def give() -> None:
        (folder / "dump.rdb" / "full").unlink()
        (folder / "dump.rdb").rmdir()
        saved("ok")

    return take, give


@pytest.mark.parametrize("fault", [out_of_memory, nearly_out_of_memory, disk_full])
def test_a_call_without_room_waits_and_says_so(
    server: EmbeddedRedis, fault: Callable[[redis.Redis, Path], Fault]
) -> None:
    client = redis.Redis.from_url(server.url)
    take, give = fault(client, server.data_dir)
    said: list[tuple[str, str]] = []
    report = PauseReport(lambda *event: said.append(event), SimpleNamespace(asked=None))  # type: ignore[arg-type]
    config = CONFIG.model_copy(update={"memory_limit": 0.5})
    with ReplayBuffer.connect(config, "run", server.url) as buffer, pauses_told(report):
        run_step(buffer, 0, buffer.replay.new_fencing_token())
        buffer.requests.push([RolloutRequest(seq=9, prompt_id="p", step=1, n=2)])
        [lease] = buffer.requests.lease("a", 1)
        group = make_group(lease, [0.0, 1.0])
        take()
        buffer._connection._memory_checked = 0.0
        timer = threading.Timer(PAUSED_S, give)
        timer.start()
        begun = time.monotonic()
        receipt = buffer.requests.add_group(group, lease, tokens_generated=1)
        assert time.monotonic() - begun >= PAUSED_S - 0.1
        timer.join()
        assert receipt.status == "fresh" and buffer.refusals > 1
        assert [kind for kind, _ in said] == ["run paused", "run continues"]
        assert "nothing is lost" in said[0][1] and "takes writes again after" in said[1][1]
        books = buffer.stats.check_ledger()
        assert (books.generated, books.in_flight, books.duplicates) == (3, 1, 0)


def test_every_kind_of_call_waits(server: EmbeddedRedis) -> None:
    """Scripts, plain commands and transactions alike; each is done once."""
    client = redis.Redis.from_url(server.url)
    calls: list[Callable[[ReplayBuffer], Any]] = [
        lambda b: b.control.set_value("x", 1),
        lambda b: b.control.heartbeat("rollout", "a", 1),
        lambda b: b.replay.publish_version(1),
        lambda b: b.requests.clear_eval(3),
    ]
    with ReplayBuffer.connect(CONFIG, "run", server.url) as buffer:
        for call in calls:
            client.config_set("maxmemory", 1)
            timer = threading.Timer(0.3, lambda: client.config_set("maxmemory", 0))
            timer.start()
            before = buffer.refusals
            call(buffer)
            timer.join()
            assert buffer.refusals > before
        assert buffer.control.get_value("x") == 1 and buffer.replay.version() == 1


def test_after_pause_s_it_is_an_error_by_name(server: EmbeddedRedis) -> None:
    client = redis.Redis.from_url(server.url)
    short = CONFIG.model_copy(update={"pause_s": 0.5})
    with ReplayBuffer.connect(short, "run", server.url) as buffer:
        client.config_set("maxmemory", 1)
        begun = time.monotonic()
        with pytest.raises(
            BufferFullError, match=r"out of memory, nothing was written; raise maxm"
        ):
            buffer.control.set_value("x", 1)
        assert 0.4 < time.monotonic() - begun < 5
        client.config_set("maxmemory", 0)
        assert buffer.control.get_value("x") is None


def test_an_order_to_stop_ends_the_pause(server: EmbeddedRedis) -> None:
    client = redis.Redis.from_url(server.url)
    signals: Any = SimpleNamespace(asked=None)
    said: list[str] = []
    report = PauseReport(lambda kind, _: said.append(kind), signals)
    with ReplayBuffer.connect(CONFIG, "run", server.url) as buffer, pauses_told(report):
        client.config_set("maxmemory", 1)
        timer = threading.Timer(0.3, lambda: setattr(signals, "asked", 15))
        timer.start()
        with pytest.raises(Stopped):
            buffer.control.set_value("x", 1)
        timer.join()
        with pytest.raises(BufferFullError):  # a last checkpoint that cannot be written says so
            buffer.control.set_value("x", 1)
    assert said == ["run paused"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("appendfsync", ["everysec", "always"])
def test_a_full_disk_pauses_the_run_and_loses_nothing(
    tiny_disk: Path, appendfsync: AppendFsync
) -> None:
    """Another program fills the disk of the append-only file, and frees it again. With ``always``
    Redis ends itself then and is started again until it can."""
    said: list[str] = []
    pause = PauseReport(lambda kind, _: said.append(kind), SimpleNamespace(asked=None))  # type: ignore[arg-type]
    budget = RestartBudget(2, "redis-server")
    with (
        EmbeddedRedis(tiny_disk / "redis", appendfsync=appendfsync) as server,
        RedisWatch(server, budget, lambda kind, _: said.append(kind), CONFIG.pause_s) as watch,
        ReplayBuffer.connect(CONFIG, "run", server.url) as buffer,
        pauses_told(pause),
    ):
        filler = tiny_disk / "another-program"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        free = threading.Timer(4.0, filler.unlink)
        free.start()
        asked = [RolloutRequest(seq=i, prompt_id=f"p{i}", step=0, n=4) for i in range(200)]
        begun = time.monotonic()
        buffer.requests.push(asked)
        for lease in buffer.requests.lease("a", 200, 600.0):
            group = make_group(lease, [0.0, 1.0, 0.0, 1.0], tokens=50)
            buffer.requests.add_group(group, lease, tokens_generated=200)
        free.join()
        assert time.monotonic() - begun >= 3.9 and watch.failure is None
        assert said[0] in ("run paused", "redis has no room") and len(set(said)) == 2
        server.kill()  # what was acknowledged is on the disk again
        time.sleep(1.0)
        books = buffer.stats.check_ledger()
        assert (books.generated, books.in_flight, books.duplicates) == (200, 200, 0)
