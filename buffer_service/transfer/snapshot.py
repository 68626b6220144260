"""A consistent copy of a run in one file, taken while writers continue.

The file is a sequence of frames: kind u8, length u32, crc32 u32, msgpack. From ``begin`` to ``end``
the scripts keep the old value of what they overwrite. So small pages, read one after the other,
still show the moment of ``begin``. Old values are kept for one snapshot, and a page follows the one
before only in the same server process: both are checked.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec
from redis.client import Pipeline

from avatar_rl.buffer_service.errors import BufferSetupError, RecordError
from avatar_rl.buffer_service.records.requests import GroupState
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.buffer_service.redis.scripting import LAYOUT

MAGIC = b"AVSNAP01"
HASHES = ("prompts", "trajs", "reuse", "groups", "tickets")
_FRAME = struct.Struct("<BII")
_STATE, _HASH, _VALUES, _END = range(4)
_PAGE, _SCAN_PAGE, _VALUE_PAGE = 1000, 200, 64  # a scanned page holds writers up for about 0.3 ms
_PATIENCE_S, _POLL_S = 30.0, 0.1  # one that was cut short looks as if it were still being taken
_RULELESS = (
    "run_id",
    "format",
    "version",
    "trained",
    "rbar_sum",
    "kl_step",
)  # what of meta travels with the contents


class SnapshotReport(msgspec.Struct, frozen=True):
    """What a snapshot holds."""

    prompts: int
    trajectories: int
    requests: int
    version: int
    trained_step: int
    size: int  # bytes


T = TypeVar("T")
Flat = list[bytes]  # field, value, field, value, ...


def _pairs(flat: Flat) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


class _State(msgspec.Struct):
    """The small state of a run, as snapshot.lua answers it."""

    meta: Flat
    ledger: Flat
    steps: Flat
    rounds: Flat
    quarantine: Flat
    corrupt: Flat
    facts: Flat
    rounds_done: list[bytes] = msgspec.field(name="rounds:done")
    fresh: Flat  # group id, score, ...
    seen: bytes  # a bit per settled seq
    evals: list[tuple[bytes, Flat]]  # round, its results


_Rows = list[tuple[bytes, bytes]]
_Page = tuple[str, _Rows]  # hash, its rows
_state = msgspec.msgpack.Decoder(_State)
_page = msgspec.msgpack.Decoder(_Page)
_rows = msgspec.msgpack.Decoder(_Rows)
_sizes = msgspec.msgpack.Decoder(dict[str, int])


class _Writer:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.write(MAGIC)

    def frame(self, kind: int, content: _State | _Page | _Rows | dict[str, int]) -> None:
        data = msgspec.msgpack.encode(content)
        self._file.write(_FRAME.pack(kind, len(data), zlib.crc32(data)) + data)


def _frames(path: Path) -> Iterator[tuple[int, bytes]]:
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
            yield kind, data
            if kind == _END:
                return
    raise RecordError(f"{path} is cut short; {remedy}")


def _read(path: Path, data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise RecordError(
            f"{path} was written by another release ({error}); restore it with that one"
        ) from error


def _checked(path: Path) -> tuple[_State, dict[str, int]]:
    """The small state and the sizes of a snapshot, once every frame of it was read."""
    last: dict[int, bytes] = {}
    for kind, data in _frames(path):
        last[kind] = data
        if kind == _HASH:
            _read(path, data, _page)
        elif kind == _VALUES:
            _read(path, data, _rows)
    return _read(path, last.get(_STATE, b""), _state), _read(path, last[_END], _sizes)


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


def _process(connection: Connection) -> str:
    """Which process the server is: a cursor means nothing to another."""
    return str(connection.attempt(lambda: connection.client.info("server")).get("run_id"))


def _wait_for_another(connection: Connection) -> None:
    """Lets a snapshot that is being taken end, for a while."""
    deadline, key = time.monotonic() + _PATIENCE_S, connection.key("meta")
    while time.monotonic() < deadline and int(
        connection.attempt(lambda: connection.client.hget(key, "snap")) or 0
    ):
        time.sleep(_POLL_S)


def _write(connection: Connection, writer: _Writer, state: _State) -> dict[str, int]:
    """All frames; returns how many records each hash has."""
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
            states = [(gid, msgspec.msgpack.decode(raw, type=GroupState)) for gid, raw in rows]
            ids += [b"%s.%d" % (gid, i) for gid, group in states for i in range(group.n)]
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
    return sizes


def save(
    connection: Connection, path: Path, on_begin: Callable[[], None] | None = None
) -> SnapshotReport:
    """Writes a snapshot to ``path``, by a temporary file and a rename. O(contents).

    Writers wait for one short script at a time. ``on_begin`` is called once the moment is fixed.
    There is one snapshot at a time. Without ``on_begin`` any moment will do, so it waits for one
    under way; else it ends that one.

    Raises RecordError when another began or Redis restarted meanwhile; ``path`` is as before."""
    if on_begin is None:
        _wait_for_another(connection)
    process, token = _process(connection), secrets.randbelow(2**53 - 1) + 1
    answer = {name.decode(): value for name, value in connection.run("snapshot", "begin", token)}
    state = msgspec.convert(answer, _State)
    if on_begin is not None:
        on_begin()
    temporary = path.with_name(path.name + f".tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            sizes = _write(connection, _Writer(file), state)
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
    meta = dict(_pairs(state.meta))
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
    requests wait again; older fencing tokens are no longer valid. No other client may write
    meanwhile: they are refused.

    Raises RecordError (bad file) or BufferSetupError (a snapshot of another layout, or of another
    run unless ``any_run``)."""
    state, sizes = _checked(path)
    meta = dict(_pairs(state.meta))
    run, layout = meta[b"run_id"].decode(), int(meta[b"format"])
    if layout != LAYOUT:
        raise BufferSetupError(
            f"{path} has layout {layout}, this code has {LAYOUT}; restore it with its release"
        )
    if run != connection.run_id and not any_run:
        raise BufferSetupError(
            f"{path} is of run {run}, not {connection.run_id}; pass any_run=True to take it over"
        )
    key = connection.key
    old = connection.attempt(lambda: connection.client.hgetall(key("meta")))
    token = max(int(old.get(b"epoch", 0)), int(meta[b"epoch"])) + 1
    wipe(connection)
    connection.attempt(lambda: connection.client.set(key("restoring"), path.name))
    for kind, data in _frames(path):
        if kind == _HASH:
            name, rows = _read(path, data, _page)
            fields = dict(rows)
            connection.attempt(lambda n=name, f=fields: connection.client.hset(key(n), mapping=f))  # type: ignore[misc]
        elif kind == _VALUES:
            found = _read(path, data, _rows)
            values = {key("t:").encode() + tid: value for tid, value in found}
            connection.attempt(lambda v=values: connection.client.mset(v))  # type: ignore[misc]
    _restore_state(connection, state)
    for name in ("prompts", "trajs", "tickets"):
        names = list(_scan(connection, name))
        for i in range(0, len(names), _PAGE):
            connection.run("index", name, *names[i : i + _PAGE])
    settings = (old or meta).items()  # capacity, quantiles, ... stay those of the connected run
    kept = {field: value for field, value in meta.items() if field.decode() in _RULELESS}
    rules = {field: value for field, value in settings if field.decode() not in _RULELESS}
    for gone in (b"drawn_step", b"kl"):  # the latter of older releases
        rules.pop(gone, None)
    renewed = {b"run_id": connection.run_id.encode(), b"epoch": b"%d" % token, b"snap": b"0"}
    tallies = {"quarantine": len(state.quarantine) // 2, "facts": len(state.facts) // 2, "drawn": 0}
    tallies["reuse"] = connection.attempt(lambda: connection.client.hlen(key("reuse")))
    renewed |= {b"n_" + name.encode(): b"%d" % count for name, count in tallies.items()}

    def settle(pipe: Pipeline) -> None:
        pipe.hset(key("meta"), mapping=rules | kept | renewed)
        pipe.delete(key("restoring"))

    connection.together(settle)
    return SnapshotReport(
        sizes["prompts"],
        sizes["trajs"],
        sizes["tickets"],
        int(meta[b"version"]),
        int(meta[b"trained"]),
        path.stat().st_size,
    )


def _restore_state(connection: Connection, state: _State) -> None:
    key = connection.key

    def write(pipe: Pipeline) -> None:
        tables = {
            "ledger": state.ledger,
            "steps": state.steps,
            "rounds": state.rounds,
            "quarantine": state.quarantine,
            "corrupt": state.corrupt,
            "facts": state.facts,
        }
        for name, flat in tables.items():
            if flat:
                pipe.hset(key(name), mapping=dict(_pairs(flat)))
        for round_, payloads in state.evals:
            if payloads:
                pipe.hset(key("eval:") + round_.decode(), mapping=dict(_pairs(payloads)))
        if state.rounds_done:
            pipe.sadd(key("rounds:done"), *state.rounds_done)
        if state.fresh:
            pipe.zadd(key("fresh"), {gid: float(score) for gid, score in _pairs(state.fresh)})
        if state.seen:
            pipe.set(key("seen"), state.seen)

    connection.together(write)
