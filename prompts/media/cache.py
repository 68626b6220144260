"""Bounded caches of decoded media: one in memory, one on disk that processes share.

Keys are content addresses (hex sha256 of file digest and decode plan), so an entry never goes
stale."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_STALE_TEMPORARY_S = 3_600.0  # a temporary file this old belongs to a dead writer


class Entry(NamedTuple):
    """A decoded array and its two numbers (video: fps, seconds; audio: Hz, seconds; image: 0,
    0)."""

    array: NDArray[Any]  # uint8 frames and pictures, float32 sound
    rate: float
    duration: float


class MemoryCache:
    """Least-recently-used entries up to ``limit`` bytes; safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def put(self, key: str, entry: Entry) -> None:
        """Store ``entry`` (its array must be read-only); one larger than the limit is passed
        over."""
        if entry.array.nbytes > self.limit:
            return
        with self._lock:
            old = self._entries.pop(key, None)
            self.bytes += entry.array.nbytes - (old.array.nbytes if old is not None else 0)
            self._entries[key] = entry
            while self.bytes > self.limit:
                _, evicted = self._entries.popitem(last=False)
                self.bytes -= evicted.array.nbytes

    def __len__(self) -> int:
        return len(self._entries)


class DiskCache:
    """One ``<key>.npy`` file per entry in a node-local folder, least recently used out first.

    Writers rename complete files into place and keep the folder's byte count under an exclusive
    lock, so several processes stay within ``limit`` together. Readers take no lock: an entry
    evicted under them is a miss."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Entry | None:
        path = self.folder / f"{key}.npy"
        try:
            with path.open("rb") as file:
                head = np.lib.format.read_array(file, allow_pickle=False)
                array = np.lib.format.read_array(file, allow_pickle=False)
            os.utime(path)  # its modification time is its last use
        except FileNotFoundError:
            return None
        except (ValueError, EOFError) as error:
            log.warning(
                "media cache entry %s is damaged (%s): removed, decoding again", path, error
            )
            path.unlink(missing_ok=True)
            return None
        array.setflags(write=False)
        return Entry(array, float(head[0]), float(head[1]))

    def put(self, key: str, entry: Entry) -> None:
        """Store ``entry``; one larger than the limit is passed over. Raises OSError when the disk
        is full."""
        temporary = self.folder / f"{key}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with temporary.open("wb") as file:
                np.lib.format.write_array(
                    file, np.array([entry.rate, entry.duration]), allow_pickle=False
                )
                np.lib.format.write_array(file, entry.array, allow_pickle=False)
            size = temporary.stat().st_size
            if size > self.limit:
                return
            with self._count() as count:
                final = self.folder / f"{key}.npy"
                if final.exists():  # another process decoded the same media meanwhile
                    return
                count.seek(0)
                before = count.read()
                # a writer killed half-way leaves the count empty: then, too, the folder is counted
                # anew
                if not before.isdigit() or int(before) + size > self.limit:
                    before = str(self._evict(self.limit - size))
                temporary.replace(final)
                count.seek(0)
                count.truncate()
                count.write(str(int(before) + size))
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _count(self) -> Iterator[IO[str]]:
        """The folder's byte count, opened under an exclusive lock."""
        with (self.folder / "bytes").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()

    def _evict(self, room: int) -> int:
        """Delete the least recently used entries until ``room`` bytes hold the rest; returns what
        is left."""
        found: list[tuple[float, int, Path]] = []
        for item in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # a reader may have removed a damaged entry meanwhile
                status = item.stat()
                if item.name.endswith(".npy"):
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
