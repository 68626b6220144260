"""Key-value entries and heartbeats that the processes of a run share."""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import Any

import msgspec

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.common.errors import ReplayBufferError
from avatar_rl.common.types import ReadOnlyJson

log = logging.getLogger(__name__)

MAX_VALUE = 1 << 20  # bytes


class Heartbeat(msgspec.Struct, frozen=True):
    """Last sign of progress of a process."""

    progress: int  # counts what it has done
    stamp_ms: int  # Redis' clock; only whether it changed means something, since clocks are set
    host: str = ""
    pid: int = 0


class RunControl:
    """Small values that processes of a run tell one another. O(1) each."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    def at(cls, config: BufferConfig, run_id: str, url: str) -> RunControl:
        """Of a run that may not be set up yet; heartbeats need no more. Nothing is sent yet."""
        return cls(Connection(config, run_id, url))

    def _hset(self, name: str, field: str, value: str | bytes | int) -> None:
        key = self._connection.key(name)
        self._connection.attempt(lambda: self._connection.client.hset(key, field, value))

    def _hget(self, name: str, field: str) -> bytes | None:
        key = self._connection.key(name)
        return self._connection.attempt(lambda: self._connection.client.hget(key, field))

    def set_desired(self, name: str, value: int) -> None:
        """Desired state for the supervisor to reconcile, e.g. rollout workers."""
        self._hset("desired", name, int(value))

    def desired(self, name: str) -> int | None:
        """The desired value; None when nobody set it."""
        found = self._hget("desired", name)
        return None if found is None else int(found)

    def set_value(self, name: str, value: ReadOnlyJson) -> None:
        """Stores anything JSON, up to 1 MiB. Part of a snapshot. Raises RecordError when it is
        not."""
        try:
            data = msgspec.json.encode(value)
        except TypeError as error:
            raise RecordError(f"value {name}: {error}; give plain JSON values") from error
        if len(data) > MAX_VALUE:
            raise RecordError(
                f"value {name} has {len(data)} bytes, at most {MAX_VALUE}; store its path instead"
            )
        self._connection.run("fact", name, data)

    def get_value(self, name: str) -> Any:
        """The value, of the shape its writer gave it; None when nobody set it."""
        found = self._hget("facts", name)
        return None if found is None else msgspec.json.decode(found)

    def heartbeat(self, role: str, id: str, progress: int) -> None:
        """Reports progress, stamped with Redis' clock."""
        self._connection.run(
            "beat", f"{role}/{id}", int(progress), socket.gethostname(), os.getpid()
        )

    def heartbeats(self) -> dict[str, Heartbeat]:
        """Latest heartbeat by "role/id"."""
        key = self._connection.key("beats")
        found = self._connection.attempt(lambda: self._connection.client.hgetall(key))
        beats = {}
        for who, raw in found.items():
            stamp, progress, *place = msgspec.msgpack.decode(raw)
            beats[who.decode()] = Heartbeat(int(progress), int(stamp), *place)
        return beats

    def watched_heartbeats(self) -> dict[str, Heartbeat]:
        """Latest heartbeats, for a watch that ends who is silent.

        The watch's own heartbeat is written first. So while Redis takes no writes this waits,
        instead of showing the silence of processes that cannot report."""
        self.heartbeat("watch", socket.gethostname(), 0)
        beats = self.heartbeats()
        return {who: beat for who, beat in beats.items() if not who.startswith("watch/")}

    def drop_heartbeat(self, role: str, id: str) -> None:
        """Forgets a process that was stopped on purpose."""
        key = self._connection.key("beats")
        self._connection.attempt(lambda: self._connection.client.hdel(key, f"{role}/{id}"))


class StartBeats:
    """Heartbeats of a process that starts, from a thread of its own.

    Begin them before torch and vLLM are imported. Until ``end`` they show that the process is not
    frozen; then the heartbeat is forgotten."""

    EVERY_S = 1.0

    def __init__(self, control: RunControl, role: str, id: str) -> None:
        self._control, self._role, self._id = control, role, id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="start-beats", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            try:
                self._control.heartbeat(self._role, self._id, 0)
            except ReplayBufferError as error:
                log.info("no heartbeat while starting: %s", error)
            if self._stop.wait(self.EVERY_S):
                return

    def end(self) -> None:
        """The process has started. Harmless when repeated."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._control.drop_heartbeat(self._role, self._id)
