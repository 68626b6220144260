"""Files of a learner's state: written with a proof, and held by a process that never needs torch
(learner/state.py makes them)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TAG = "state"  # DeepSpeed's folder inside a checkpoint's learner/
Files = dict[str, NDArray[np.uint8]]  # file name -> content


@dataclass(frozen=True)
class FileProof:
    """What a written file must read back as."""

    bytes: int
    sha256: str


def write_files(files: Mapping[str, NDArray[np.uint8]], folder: Path) -> dict[str, FileProof]:
    """Write ``files`` into ``folder``/state, flushed to the disk; their proofs by path below
    ``folder``."""
    place = folder / TAG
    place.mkdir(parents=True, exist_ok=True)
    proofs = {}
    for name, content in files.items():
        with open(place / name, "wb") as file:
            file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
        proofs[f"{TAG}/{name}"] = FileProof(
            content.nbytes, hashlib.sha256(content.data).hexdigest()
        )
    return proofs


class StateReplica:
    """Plain class; the cluster makes it a Ray actor. Holds the state of the ``keep`` newest
    versions, and a pinned one.

    Two, because a version that was replicated and published may yet fail to be committed.
    """

    def __init__(self, ranks: int, keep: int = 2) -> None:
        self.ranks, self.keep = ranks, keep
        self._held: dict[int, dict[int, Files]] = {}  # version -> rank -> files
        self._pinned: dict[int, dict[int, Files]] = {}

    def store(self, version: int, rank: int, files: Files) -> None:
        """Take a copy of one rank's part of ``version``; a repeat replaces it.

        What came lies in Ray's object store. Two states there, and a third on its way, would fill
        it: then every third step waits seconds for room."""
        self._held.setdefault(version, {})[rank] = {
            name: content.copy() for name, content in files.items()
        }
        for old in sorted(self._held)[: -self.keep]:
            del self._held[old]

    def versions(self) -> list[int]:
        """Versions held of all ranks, oldest first."""
        return sorted(version for version, parts in self._held.items() if len(parts) == self.ranks)

    def pin(self, version: int) -> bool:
        """Keep ``version`` until it is written, in place of what was pinned before; False when it
        is not held."""
        self._pinned = {version: dict(self._held[version])} if version in self.versions() else {}
        return bool(self._pinned)

    def write(self, version: int, folder: Path) -> dict[str, FileProof] | None:
        """Write ``version`` below ``folder``; None when it is not held of all ranks (any more)."""
        parts = self._pinned.pop(version, None) or self._held.get(version, {})
        if len(parts) != self.ranks:
            return None
        together: Files = {}
        for files in list(parts.values()):
            together.update(files)
        return write_files(together, folder)
