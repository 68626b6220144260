"""A process that freezes while it starts is ended soon, not after ``start_timeout_s``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.control import RunControl, StartBeats
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.workers.pool import Pool, StartDeathError
from avatar_rl.cluster.workers.supervision import StartWatch, actor_process

STALL_S = 10.0  # above the imports before the first heartbeat, also on a busy machine


def actor_pid(actor: Any) -> int:
    """Of a dead actor, too."""
    from ray._private import state

    return int(state.actors(actor._actor_id.hex())["Pid"])


@pytest.fixture
def ray_cluster(tmp_path: Path) -> Iterator[Any]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


class Starting:
    """Stops itself like a process that the kernel froze, or takes long to start."""

    def __init__(self, url: str, name: str, frozen: str) -> None:
        if frozen == "at once":
            os.kill(os.getpid(), signal.SIGSTOP)
        StartBeats(RunControl.at(BufferConfig(), "run", url), "rollout", name)
        time.sleep(1)
        if frozen:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(STALL_S + 3)

    def ready(self) -> str:
        return "ready"


@pytest.mark.parametrize("freezes", ["at once", "later"])
def test_a_frozen_start_is_ended_and_a_slow_one_is_not(
    ray_cluster: Any, tmp_path: Path, freezes: str
) -> None:
    """Also one that freezes before its first heartbeat, beside one that waits for a place."""
    with EmbeddedRedis(tmp_path, persistent=False) as server:
        control = RunControl.at(BufferConfig(), "run", server.url)
        pool: Any = object.__new__(Pool)
        pool.config = SimpleNamespace(resources=SimpleNamespace(start_timeout_s=120))
        pool._starts = StartWatch(control.watched_heartbeats, STALL_S)
        make = ray_cluster.remote(Starting).options(num_cpus=0)
        slow = make.remote(server.url, "slow", "")
        frozen = make.remote(server.url, "frozen", freezes)
        waiting = ray_cluster.remote(Starting).options(num_cpus=8).remote(server.url, "w", "")
        starting = {"rollout/slow": slow, "rollout/frozen": frozen, "rollout/w": waiting}
        begun = time.monotonic()
        with pytest.raises(StartDeathError, match="died while starting"):
            pool.wait_ready([frozen.ready.remote()], "rollout actors", starting)
        assert time.monotonic() - begun < 90
        beat = control.heartbeats().get("rollout/frozen")
        assert (beat is None) == (freezes == "at once")
        pid = actor_pid(frozen) if beat is None else beat.pid
        with pytest.raises(ProcessLookupError):  # a stopped process does not hear Ray: SIGKILL
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
        assert actor_process(waiting) is None
        assert pool.wait_ready([slow.ready.remote()], "rollout actors", starting) == ["ready"]
