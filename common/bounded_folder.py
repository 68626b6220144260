"""A node-local folder of entries, bounded in bytes, that several processes share.

Entries are whole files under content addresses, so none goes stale. Writers rename complete files
into place. A process that is killed leaves nothing that a reader takes for an entry."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

_STALE_TEMPORARY_S = 3_600.0  # a temporary file this old belongs to a dead writer


class BoundedFolder:
    """Files ``<key><suffix>`` of at most ``limit`` bytes together, the least recently used out
    first. Other files in the folder are neither read, counted nor deleted."""

    def __init__(self, folder: Path, limit: int, suffix: str) -> None:
        self.folder, self.limit, self.suffix = folder, limit, suffix
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}{self.suffix}"

    def touch(self, key: str) -> None:
        """Note a use: an entry's modification time is its last one."""
        with suppress(OSError):  # evicted meanwhile, or of another user: it was read all the same
            os.utime(self.path(key))

    def put(self, key: str, write: Callable[[BinaryIO], None]) -> None:
        """Store what ``write`` writes. A file that is there stays; one above the limit is passed
        over. Raises OSError when the disk is full."""
        temporary = self.folder / f"{key}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with temporary.open("wb") as file:
                write(file)
            size = temporary.stat().st_size
            if size > self.limit:
                return
            with self._count() as count:
                final = self.path(key)
                if final.exists():  # another process was faster
                    return
                count.seek(0)
                before = count.read()
                # A writer killed half-way leaves the count empty: then, too, the folder is counted
                # anew.
                if not before.isdigit() or int(before) + size > self.limit:
                    before = str(self._evict(self.limit - size))
                # The count first: one that is too high is put right at the next eviction, one that
                # is too low would let the folder grow.
                count.seek(0)
                count.truncate()
                count.write(str(int(before) + size))
                count.flush()
                temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _count(self) -> Iterator[IO[str]]:
        """The folder's byte count, opened under an exclusive lock."""
        with (self.folder / "bytes").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _evict(self, room: int) -> int:
        """Delete the least recently used entries until ``room`` bytes hold the rest; returns what
        is left."""
        found: list[tuple[float, int, Path]] = []
        for item in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # a reader may have removed a damaged entry meanwhile
                status = item.stat()
                if item.name.endswith(self.suffix):
                    found.append((status.st_mtime, status.st_size, Path(item.path)))
                elif (
                    item.name.endswith(".tmp")
                    and time.time() - status.st_mtime > _STALE_TEMPORARY_S
                ):
                    os.unlink(item.path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total
