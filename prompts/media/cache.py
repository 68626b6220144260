"""Bounded caches of decoded media: one in memory, one on disk that processes share.

Keys are content addresses (hex sha256 of file digest and decode plan), so an entry never goes
stale."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avatar_rl.common.bounded_folder import BoundedFolder

log = logging.getLogger(__name__)


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

    Several processes stay within ``limit`` together (``BoundedFolder``). Readers take no lock: an
    entry evicted under them is a miss."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.files = BoundedFolder(folder, limit, ".npy")
        self.folder = folder
        self.limit = limit

    def get(self, key: str) -> Entry | None:
        path = self.files.path(key)
        try:
            with path.open("rb") as file:
                head = np.lib.format.read_array(file, allow_pickle=False)
                array = np.lib.format.read_array(file, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError) as error:
            log.warning(
                "media cache entry %s is damaged (%s): removed, decoding again", path, error
            )
            path.unlink(missing_ok=True)
            return None
        self.files.touch(key)
        array.setflags(write=False)
        return Entry(array, float(head[0]), float(head[1]))

    def put(self, key: str, entry: Entry) -> None:
        """Store ``entry``; one larger than the limit is passed over. Raises OSError when the disk
        is full."""

        def write(file: BinaryIO) -> None:
            head = np.array([entry.rate, entry.duration])
            np.lib.format.write_array(file, head, allow_pickle=False)
            np.lib.format.write_array(file, entry.array, allow_pickle=False)

        self.files.put(key, write)
