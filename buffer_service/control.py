"""Key-value entries and heartbeats that the processes of a run share."""

from __future__ import annotations

from typing import Any

import msgspec
from redis.client import Pipeline

from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.common.types import ReadOnlyJson

MAX_VALUE = 1 << 20  # bytes


class Heartbeat(msgspec.Struct, frozen=True):
    """Last sign of progress of a process."""

    progress: int  # counts what it has done; alive means it grows
    age_s: float  # by Redis' clock


class RunControl:
    """Small values that processes of a run tell one another. O(1) each."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

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
        self._hset("facts", name, data)

    def get_value(self, name: str) -> Any:
        """The value, of the shape its writer gave it; None when nobody set it."""
        found = self._hget("facts", name)
        return None if found is None else msgspec.json.decode(found)

    def heartbeat(self, role: str, id: str, progress: int) -> None:
        """Reports progress, stamped with Redis' clock."""
        self._connection.run("beat", f"{role}/{id}", int(progress))

    def heartbeats(self) -> dict[str, Heartbeat]:
        """Latest heartbeat by "role/id"."""

        def ask(pipe: Pipeline) -> None:
            pipe.time()
            pipe.hgetall(self._connection.key("beats"))

        (seconds, micros), found = self._connection.together(ask)
        now = seconds * 1000 + micros / 1000
        beats = {}
        for who, raw in found.items():
            at, progress = msgspec.msgpack.decode(raw)
            beats[who.decode()] = Heartbeat(int(progress), max(0.0, (now - at) / 1000))
        return beats

    def drop_heartbeat(self, role: str, id: str) -> None:
        """Forgets a process that was stopped on purpose."""
        key = self._connection.key("beats")
        self._connection.attempt(lambda: self._connection.client.hdel(key, f"{role}/{id}"))
