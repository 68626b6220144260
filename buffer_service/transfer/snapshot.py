"""A consistent copy of a run in one file, taken while writers go on; and records for other tools
(JSONL, parquet).

The file is a sequence of frames: kind u8, length u32, crc32 u32, msgpack. From ``begin`` to ``end``
the scripts keep the old value of whatever they overwrite, so small pages read one after the other
still show the moment of ``begin``. They keep it for one snapshot, and a page follows the one before
only in the same server process: both are checked."""

from __future__ import annotations

import os
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from avatar_rl.buffer_service.errors import BufferSetupError, RecordError
from avatar_rl.buffer_service.redis.connection import Connection

MAGIC = b"AVSNAP01"
HASHES = ("prompts", "trajs", "reuse", "groups", "tickets")
_FRAME = struct.Struct("<BII")
_STATE, _HASH, _VALUES, _END = range(4)
_PAGE, _SCAN_PAGE, _VALUE_PAGE = 1000, 200, 64  # a scanned page holds writers up for about 0.3 ms
_PATIENCE_S, _POLL_S = 30.0, 0.1  # one that was cut short looks as if it were still being taken
_TABLES = (
    "meta",
    "ledger",
    "steps",
    "rounds",
    "rounds:done",
    "quarantine",
    "corrupt",
    "facts",
    "fresh",
    "seen",
    "evals",
)
_RULELESS = (
    "run_id",
    "format",
    "version",
    "trained",
    "rbar_sum",
    "kl",
)  # what of meta travels with the contents


class SnapshotReport(msgspec.Struct, frozen=True):
    """What a snapshot holds."""

    prompts: int
    trajectories: int
    requests: int
    version: int
    trained_step: int
    size: int  # bytes


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


class _Writer:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.write(MAGIC)

    def frame(self, kind: int, content: Any) -> None:
        data = msgspec.msgpack.encode(content)
        self._file.write(_FRAME.pack(kind, len(data), zlib.crc32(data)) + data)


def _frames(path: Path) -> Iterator[tuple[int, Any]]:
    """Frames of a snapshot. Raises RecordError when the file is foreign, damaged or cut short."""
    remedy = "take an older snapshot"
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise RecordError(f"{path} is not a buffer snapshot of this format; {remedy}")
        while head := file.read(_FRAME.size):
            if len(head) < _FRAME.size:
                break
            kind, length, crc = _FRAME.unpack(head)
            data = file.read(length)
            if len(data) != length or zlib.crc32(data) != crc:
                raise RecordError(f"{path} is damaged at byte {file.tell() - len(data)}; {remedy}")
            yield kind, msgspec.msgpack.decode(data)
            if kind == _END:
                return
    raise RecordError(f"{path} is cut short; {remedy}")


def _scan(connection: Connection, name: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    cursor = 0
    while True:
        at = cursor
        cursor, page = connection.attempt(
            lambda at=at: connection.client.hscan(connection.key(name), at, count=_SCAN_PAGE)  # type: ignore[misc]
        )
        found.update(page)
        if cursor == 0:
            return found


def _process(connection: Connection) -> Any:
    """Which process the server is: a cursor means nothing to another."""
    return connection.attempt(lambda: connection.client.info("server")).get("run_id")


def _wait_for_another(connection: Connection) -> None:
    """Lets a snapshot that is being taken end, for a while."""
    deadline, key = time.monotonic() + _PATIENCE_S, connection.key("meta")
    while time.monotonic() < deadline and int(
        connection.attempt(lambda: connection.client.hget(key, "snap")) or 0
    ):
        time.sleep(_POLL_S)


def save(
    connection: Connection, path: Path, on_begin: Callable[[], None] | None = None
) -> SnapshotReport:
    """Writes a snapshot to ``path`` (by way of a temporary file and a rename). Writers are held up
    for one short script at a time; ``on_begin`` is called once the moment it shows is fixed.
    O(contents).

    One at a time: without ``on_begin`` (any moment will do) it waits for one under way, else it
    ends that one. Raises RecordError when another began or Redis restarted meanwhile; then ``path``
    is as before."""
    if on_begin is None:
        _wait_for_another(connection)
    process, token = _process(connection), secrets.randbelow(2**53 - 1) + 1
    state = dict(zip(_TABLES, connection.run("snapshot", "begin", token), strict=True))
    if on_begin is not None:
        on_begin()
    temporary = path.with_name(path.name + f".tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            writer = _Writer(file)
            writer.frame(_STATE, state)
            sizes: dict[str, int] = {}
            ids: list[bytes] = []
            for name in HASHES:
                fields = _scan(connection, name)
                fields.update(_scan(connection, f"snap:{name}"))
                rows = [(field, value) for field, value in fields.items() if value]
                sizes[name] = len(rows)
                for i in range(0, len(rows), _PAGE):
                    writer.frame(_HASH, (name, rows[i : i + _PAGE]))
                if name == "trajs":
                    ids += [field for field, _ in rows]
                elif name == "groups":
                    ids += [
                        b"%s.%d" % (gid, i)
                        for gid, raw in rows
                        for i in range(msgspec.msgpack.decode(raw)[3])
                    ]
            for i in range(0, len(ids), _VALUE_PAGE):
                part = ids[i : i + _VALUE_PAGE]
                keys = [connection.key("t:").encode() + tid for tid in part]
                values = connection.attempt(lambda keys=keys: connection.client.mget(keys))  # type: ignore[misc]
                if None in values:
                    gone = part[values.index(None)].decode()
                    raise RecordError(
                        f"trajectory {gone} vanished while the snapshot was taken; take it again"
                    )
                writer.frame(_VALUES, list(zip(part, values, strict=True)))
            writer.frame(_END, sizes)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if not connection.run("snapshot", "end", token) or _process(connection) != process:
            raise RecordError(
                f"{path}: another snapshot began or Redis restarted while it was taken; take it "
                "again"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        connection.run("snapshot", "end", token)
    meta = dict(_pairs(state["meta"]))
    return SnapshotReport(
        sizes["prompts"],
        sizes["trajs"],
        sizes["tickets"],
        int(meta[b"version"]),
        int(meta[b"trained"]),
        size,
    )


def wipe(connection: Connection) -> int:
    """Removes every key of the run; returns how many."""
    gone = 0
    cursor = 0
    pattern = connection.prefix.replace("[", r"\[") + "*"
    while True:
        at = cursor
        cursor, keys = connection.attempt(
            lambda at=at: connection.client.scan(at, match=pattern, count=_PAGE)  # type: ignore[misc]
        )
        if keys:
            gone += connection.attempt(lambda keys=keys: connection.client.unlink(*keys))  # type: ignore[misc]
        if cursor == 0:
            return gone


def load(connection: Connection, path: Path, *, any_run: bool = False) -> SnapshotReport:
    """Replaces the run's contents by a snapshot. The whole file is checked first. Leases end, their
    requests wait again; a new epoch begins. No other client may write meanwhile: they are refused.

    Raises RecordError (bad file) or BufferSetupError (a snapshot of another run, unless
    ``any_run``)."""
    ends = [content for kind, content in _frames(path) if kind == _END]
    state: dict[str, Any] = next(content for kind, content in _frames(path) if kind == _STATE)
    meta = dict(_pairs(state["meta"]))
    if meta[b"run_id"].decode() != connection.run_id and not any_run:
        raise BufferSetupError(
            f"{path} is of run {meta[b'run_id'].decode()}, not {connection.run_id}; pass "
            "any_run=True to take it over"
        )
    key = connection.key
    old = connection.attempt(lambda: connection.client.hgetall(key("meta")))
    epoch = max(int(old.get(b"epoch", 0)), int(meta[b"epoch"])) + 1
    wipe(connection)
    connection.attempt(lambda: connection.client.set(key("restoring"), path.name))
    for kind, content in _frames(path):
        if kind == _HASH:
            name, rows = content
            fields = dict(rows)
            connection.attempt(lambda n=name, f=fields: connection.client.hset(key(n), mapping=f))  # type: ignore[misc]
        elif kind == _VALUES:
            values = {key("t:").encode() + tid: value for tid, value in content}
            connection.attempt(lambda v=values: connection.client.mset(v))  # type: ignore[misc]
    _restore_state(connection, state)
    for name in ("prompts", "trajs", "tickets"):
        names = list(_scan(connection, name))
        for i in range(0, len(names), _PAGE):
            connection.run("index", name, *names[i : i + _PAGE])
    kept = {field.decode(): value for field, value in meta.items() if field.decode() in _RULELESS}
    rules = {
        field: value for field, value in (old or meta).items() if field.decode() not in _RULELESS
    }
    rules.pop(b"drawn_step", None)

    def settle(pipe: Any) -> None:
        pipe.hset(
            key("meta"),
            mapping={**rules, **kept, "run_id": connection.run_id, "epoch": epoch, "snap": 0},
        )
        pipe.delete(key("restoring"))

    connection.together(settle)
    sizes = ends[0]
    return SnapshotReport(
        sizes["prompts"],
        sizes["trajs"],
        sizes["tickets"],
        int(meta[b"version"]),
        int(meta[b"trained"]),
        path.stat().st_size,
    )


def _restore_state(connection: Connection, state: dict[str, Any]) -> None:
    key = connection.key

    def write(pipe: Any) -> None:
        for name in ("ledger", "steps", "rounds", "quarantine", "corrupt", "facts"):
            if state[name]:
                pipe.hset(key(name), mapping=dict(_pairs(state[name])))
        for round_, payloads in state["evals"]:
            if payloads:
                pipe.hset(key("eval:") + round_.decode(), mapping=dict(_pairs(payloads)))
        if state["rounds:done"]:
            pipe.sadd(key("rounds:done"), *state["rounds:done"])
        if state["fresh"]:
            pipe.zadd(key("fresh"), {gid: float(score) for gid, score in _pairs(state["fresh"])})
        if state["seen"]:
            pipe.set(key("seen"), state["seen"])

    connection.together(write)
