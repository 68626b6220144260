"""Starts an embedded Redis again when it dies."""

from __future__ import annotations

import threading
import time

from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.services.restart_budget import Report, RestartBudget
from avatar_rl.common.errors import AvatarError


class RedisWatch:
    """Starts an embedded Redis again when it dies; its clients reconnect within
    ``buffer.reconnect_s``."""

    LOOK_S = 0.1

    def __init__(self, server: EmbeddedRedis, budget: RestartBudget, report: Report) -> None:
        self.server, self._budget, self._report = server, budget, report
        self.failure: AvatarError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="redis-supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns once it will not start the server any more."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.LOOK_S):
            if self.server.pid is not None:
                continue
            started = time.monotonic()
            try:
                self._budget.spend("redis-server")
                self.server.start()
            except AvatarError as error:
                self.failure = error
                return
            seconds = time.monotonic() - started
            self._report(
                "redis restarted",
                f"it died and is back from its append-only file ({seconds:.2f} s)",
            )
