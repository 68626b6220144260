"""Files that survive a crash and a full disk: whole records appended, whole files replaced, torn
tails left out."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from avatar_rl.common.errors import DataError

#: Records kept in memory while the disk is full, oldest dropped first.
MAX_PENDING = 10_000


class Appender:
    """Append-only file of whole records: a failed write is undone, its record kept and retried with
    the next one."""

    def __init__(self, path: Path, on_trouble: Callable[[OSError], None]) -> None:
        self.path = path
        self.lost = 0
        self._on_trouble = on_trouble
        self._pending: deque[bytes] = deque()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run

    @property
    def pending(self) -> int:
        return len(self._pending)

    def append(self, record: bytes) -> bool:
        """Write ``record`` after those still pending; False while the disk refuses."""
        self._pending.append(record)
        if len(self._pending) > MAX_PENDING:
            self._pending.popleft()
            self.lost += 1
        return self.flush()

    def flush(self) -> bool:
        """Try again what is pending."""
        while self._pending:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(self._pending[0]) != len(self._pending[0]):
                    raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                os.ftruncate(
                    self._file.fileno(), size
                )  # shrinking needs no space: no torn record stays
                self._on_trouble(error)
                return False
            self._pending.popleft()
        return True

    def close(self) -> None:
        self._file.close()


def replace_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def json_line(row: Mapping[str, Any]) -> bytes:
    """One JSONL record; NaN and infinity become null, numpy numbers plain ones."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a torn last line (kill -9 in mid-write) is left out, any other
    damage is a DataError."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: never finished
                return
            raise DataError(
                f"{path} line {number} is not JSON ({error}); restore or delete that line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number} is a {type(row).__name__}, not an object; delete that line"
            )
        yield row
