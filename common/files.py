"""Files that survive a crash and a full disk: records appended whole, files and folders written
whole or not at all, torn tails left out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, SupportsFloat, TypeAlias

from avatar_rl.common.errors import DataError
from avatar_rl.common.types import Json

#: Records kept in memory while the disk is full, oldest dropped first.
MAX_PENDING = 10_000

#: JSON, and numbers of numpy and torch.
Writable: TypeAlias = (
    "bool | int | str | SupportsFloat | Sequence[Writable] | Mapping[str, Writable] | None"
)


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


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to. At the end of the block that file becomes ``path``.

    A reader sees the old file or the new one. An error leaves the old one and nothing beside it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill. At the end of the block it becomes ``path``.

    Raises DataError when ``path`` exists and is not an empty folder. An error in the block leaves
    nothing.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} already holds something: choose another folder or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        yield work
        work.replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file as ``replaced_file`` does."""
    with replaced_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_line(row: Mapping[str, Writable]) -> bytes:
    """One JSONL record; NaN and infinity become null, numpy numbers plain ones."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: Writable) -> Json:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
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
