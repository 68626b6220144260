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
from avatar_rl.cluster.workers.supervision import StartWatch

STALL_S = 3.0


@pytest.fixture
def ray_cluster(tmp_path: Path) -> Iterator[Any]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


class Starting:
    """Stops itself like a process that the kernel froze, or takes long to start."""

    def __init__(self, url: str, name: str, frozen: bool) -> None:
        StartBeats(RunControl.at(BufferConfig(), "run", url), "rollout", name)
        time.sleep(1)
        if frozen:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(STALL_S + 3)

    def ready(self) -> str:
        return "ready"


def test_a_frozen_start_is_ended_and_a_slow_one_is_not(ray_cluster: Any, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, persistent=False) as server:
        control = RunControl.at(BufferConfig(), "run", server.url)
        pool: Any = object.__new__(Pool)
        pool.config = SimpleNamespace(resources=SimpleNamespace(start_timeout_s=120))
        pool._starts = StartWatch(control.watched_heartbeats, STALL_S)
        make = ray_cluster.remote(Starting).options(num_cpus=0)
        slow = make.remote(server.url, "slow", False)
        frozen = make.remote(server.url, "frozen", True)
        starting = {"rollout/slow": slow, "rollout/frozen": frozen}
        begun = time.monotonic()
        with pytest.raises(StartDeathError, match="died while starting"):
            pool.wait_ready([frozen.ready.remote()], "rollout actors", starting)
        assert time.monotonic() - begun < 40
        beat = control.heartbeats()["rollout/frozen"]
        with pytest.raises(ProcessLookupError):  # a stopped process does not hear Ray: SIGKILL
            for _ in range(100):
                os.kill(beat.pid, 0)
                time.sleep(0.1)
        assert pool.wait_ready([slow.ready.remote()], "rollout actors", starting) == ["ready"]
