"""Trajectories for other tools and back: JSON lines or parquet, one row each, the rows of a group
together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.codec import decode
from avatar_rl.buffer_service.records.requests import InsertReceipt
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.records.validate import check_group, group_id, trajectory_id
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.files import replaced_file

_PAGE = 64


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """One trajectory as plain values (``Trajectory`` says what they mean)."""

    id: str
    group_id: str
    prompt_id: str
    index: int
    hinted: bool
    prompt_tokens: int
    prompt_digest: int
    token_ids: list[int]
    logprobs: list[float]
    versions: list[tuple[int, int]]
    finish_reason: str
    temperature: float
    reward: float
    components: dict[str, float | None]
    step: int


class ImportReport(msgspec.Struct):
    """What an import did."""

    groups: int = 0
    trajectories: int = 0
    duplicates: int = 0  # groups that were known before
    evicted: int = 0  # trajectories that went for capacity


def rows(connection: Connection) -> Iterator[Row]:
    """Replayable trajectories by id; those removed meanwhile are left out."""
    ids = sorted(
        connection.attempt(lambda: connection.client.zrange(connection.key("stock:v"), 0, -1))
    )
    for i in range(0, len(ids), _PAGE):
        part = ids[i : i + _PAGE]
        keys = [connection.key("t:").encode() + tid for tid in part]
        values = connection.attempt(lambda keys=keys: connection.client.mget(keys))  # type: ignore[misc]
        for tid, data in zip(part, values, strict=True):
            if data is None:
                continue
            t = decode(data, tid.decode())
            row = msgspec.structs.asdict(t)
            row["token_ids"], row["logprobs"] = t.token_ids.tolist(), t.logprobs.tolist()
            row["versions"] = list(t.versions)
            yield Row(**row)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(
            f"{path}: trajectories are kept as .jsonl or .parquet; choose one of these suffixes"
        )


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of an exported file with their number from 1. Raises ConfigError (no such file, another
    suffix), RecordError (a row that is not one, a file that is damaged)."""
    _check_suffix(path)
    if not path.is_file():
        raise ConfigError(f"{path} is missing; name a file that `avatar buffer export` wrote")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    decoder = msgspec.json.Decoder(Row)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise RecordError(f"{path}, row {number}: {error}; export it again") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PAGE):
                for values in batch.to_pylist():
                    number += 1
                    if isinstance(values.get("components"), list):
                        values["components"] = dict(values["components"])
                    yield number, msgspec.convert(values, Row)
    except (pa.ArrowException, msgspec.ValidationError, OSError, TypeError, ValueError) as error:
        raise RecordError(f"{path}, row {number}: {error}; export it again") from error


def _group(path: Path, number: int, gid: str, rows: list[Row], seq: int) -> Group:
    name = group_id(seq)
    try:
        members = tuple(
            Trajectory(
                id=trajectory_id(name, i),
                group_id=name,
                prompt_id=row.prompt_id,
                index=i,  # numbered again: what was evicted leaves no gap
                hinted=row.hinted,
                prompt_tokens=row.prompt_tokens,
                prompt_digest=row.prompt_digest,
                token_ids=np.array(row.token_ids, np.int32),
                logprobs=np.array(row.logprobs, np.float32),
                versions=tuple(row.versions),
                finish_reason=row.finish_reason,
                temperature=row.temperature,
                reward=row.reward,
                components=row.components,
                step=row.step,
            )
            for i, row in enumerate(rows)
        )
        first = members[0]
        group = Group(
            id=name,
            prompt_id=first.prompt_id,
            seq=seq,
            step=first.step,
            hinted=first.hinted,
            trajectories=members,
        )
        check_group(group)
    except (RecordError, OverflowError) as error:
        raise RecordError(
            f"{path}, rows {number} to {number + len(rows) - 1}, group {gid}: {error}"
        ) from error
    return group


def read_groups(path: Path, first_seq: int | None = None) -> Iterator[Group]:
    """Groups of an exported file, numbered from ``first_seq`` or as they were. Raises as
    ``read_rows``, and RecordError for a group that is split or malformed."""
    met: set[str] = set()
    for gid, numbered in groupby(read_rows(path), key=lambda pair: pair[1].group_id):
        pairs = list(numbered)
        number, rows = pairs[0][0], sorted((row for _, row in pairs), key=lambda row: row.index)
        if gid in met:
            raise RecordError(
                f"{path}, row {number}: group {gid} appeared before; sort the rows by id"
            )
        if first_seq is None and not (gid.isascii() and gid.isdigit()):
            raise RecordError(
                f"{path}, row {number}: group id {gid!r} is no seq; give the first seq to number "
                "from"
            )
        seq = int(gid) if first_seq is None else first_seq + len(met)
        met.add(gid)
        yield _group(path, number, gid, rows, seq)


def import_groups(
    add: Callable[[Group], InsertReceipt], path: Path, first_seq: int | None
) -> ImportReport:
    """Gives the groups of an exported file to ``add``, once the whole file was checked. O(file).

    Raises as ``read_groups`` and as ``add``; then the groups before the one at fault stay."""
    for _ in read_groups(path, first_seq):
        pass
    report = ImportReport()
    for group in read_groups(path, first_seq):
        receipt = add(group)
        report.evicted += receipt.evicted
        if receipt.status == "duplicate":
            report.duplicates += 1
        else:
            report.groups += 1
            report.trajectories += len(group.trajectories)
    return report


def export(connection: Connection, path: Path) -> int:
    """Writes ``rows`` to ``path`` by its suffix. Raises ConfigError for any but .jsonl and
    .parquet."""
    _check_suffix(path)
    count = 0
    with replaced_file(path) as temporary:
        if path.suffix == ".jsonl":
            with temporary.open("wb") as file:
                for row in rows(connection):
                    file.write(msgspec.json.encode(row) + b"\n")
                    count += 1
        else:
            count = _write_parquet(connection, temporary)
    return count


def _write_parquet(connection: Connection, path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("group_id", pa.string()),
            ("prompt_id", pa.string()),
            ("index", pa.int32()),
            ("hinted", pa.bool_()),
            ("prompt_tokens", pa.int32()),
            ("prompt_digest", pa.uint32()),
            ("token_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            ("versions", pa.list_(pa.list_(pa.int64()))),
            ("finish_reason", pa.string()),
            ("temperature", pa.float64()),
            ("reward", pa.float64()),
            ("components", pa.map_(pa.string(), pa.float64())),
            ("step", pa.int64()),
        ]
    )
    count, batch = 0, list[dict[str, Any]]()  # what pyarrow takes
    with pq.ParquetWriter(path, schema) as writer:
        for row in rows(connection):
            values = msgspec.structs.asdict(row)
            values["components"] = list(row.components.items())
            batch.append(values)
            count += 1
            if len(batch) == 1000:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return count
