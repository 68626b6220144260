"""Trajectories for other tools: JSON lines or parquet, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from buffer_service.codec import decode
from buffer_service.connection import Connection
from prompts.errors import ConfigError

_PAGE = 64


def rows(connection: Connection) -> Iterator[dict[str, Any]]:
    """Replayable trajectories by id as plain values; those removed meanwhile are left out."""
    ids = sorted(connection.attempt(lambda: connection.client.zrange(connection.key("stock:v"), 0, -1)))
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
            row["versions"] = [list(pair) for pair in t.versions]
            yield row


def export(connection: Connection, path: Path) -> int:
    """Writes ``rows`` to ``path`` by its suffix. Raises ConfigError for any but .jsonl and .parquet."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{path}: export writes .jsonl or .parquet; choose one of these suffixes")
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    try:
        if path.suffix == ".jsonl":
            with temporary.open("wb") as file:
                for row in rows(connection):
                    file.write(msgspec.json.encode(row) + b"\n")
                    count += 1
        else:
            count = _write_parquet(connection, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
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
    count, batch = 0, list[dict[str, Any]]()
    with pq.ParquetWriter(path, schema) as writer:
        for row in rows(connection):
            row["components"] = list(row["components"].items())
            batch.append(row)
            count += 1
            if len(batch) == 1000:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return count
