"""The embedding store: what frozen towers made of media, on the node's disk.

One safetensors file per entry, named by its content address. The store outlives the process and is
shared by every process of the node that may write the folder."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from avatar_rl.common.bounded_folder import BoundedFolder
from avatar_rl.common.errors import InputError

log = logging.getLogger(__name__)

_FORMAT = "avatar-embedding-1"
_LOCKS = 64  # files that claims lock; two entries that share one only wait for each other


class Stored(NamedTuple):
    """An entry: tensors by name, and a few words about them."""

    tensors: dict[str, Tensor]
    notes: dict[str, str]


def default_folder() -> Path:
    """Node-local and of this user: below TMPDIR. Raises InputError where another user has made it,
    who could then write what this run trains on."""
    own = Path(tempfile.gettempdir()) / f"avatar-rl-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():
        raise InputError(
            own,
            "the embedding store's folder belongs to another user",
            "set learner.embeddings.folder to a folder of your own on this node's disk",
        )
    return own / "embeddings"


class EmbeddingStore:
    """Entries of at most ``limit`` bytes together in ``folder``, the least recently used out first.

    A torn, damaged or foreign file under an entry's name counts as a miss and is removed. When the
    disk is full the store goes on reading, and says once that it does not write. Raises InputError
    when the folder cannot be made or is another user's.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._files = BoundedFolder(folder, limit, ".embedding")
            (folder / "claims").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                folder,
                f"the embedding store cannot be made there ({error.strerror})",
                "set learner.embeddings.folder to a writable folder on this node's own disk, or "
                "learner.embeddings.mode to off",
            ) from error
        self._told = False

    def get(self, key: str) -> Stored | None:
        """The entry, or None where there is none that is whole."""
        from safetensors import SafetensorError, safe_open

        path = self._files.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                notes = dict(file.metadata() or {})
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            self._remove(path, str(error))
            return None
        if notes.pop("format", "") != _FORMAT or notes.pop("key", "") != key:
            self._remove(path, "not an entry of this name")
            return None
        if notes.pop("crc32", "") != str(_checksum(tensors)):
            self._remove(path, "its checksum differs")
            return None
        self._files.touch(key)
        return Stored(tensors, notes)

    def has(self, key: str) -> bool:
        """Whether there is an entry of this name, without reading it."""
        return self._files.path(key).exists()

    def put(self, key: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> bool:
        """Store an entry; whether it is there afterwards. One larger than the whole store is
        not."""
        from safetensors.torch import save

        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        words = {**notes, "format": _FORMAT, "key": key, "crc32": str(_checksum(held))}
        data = save(held, metadata=words)

        def write(file: BinaryIO) -> None:
            file.write(data)

        try:
            self._files.put(key, write)
        except OSError as error:
            if not self._told:
                log.warning(
                    "embedding store %s cannot be written (%s): continuing without storing; free "
                    "some space or lower learner.embeddings.bytes",
                    self.folder,
                    error,
                )
            self._told = True
        return self.has(key)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Only one process of the node works on ``key`` inside the block. A process that dies gives
        its claim back. Do not nest it."""
        name = self.folder / "claims" / str(zlib.crc32(key.encode()) % _LOCKS)
        try:
            file = name.open("a")
        except OSError:  # full or read-only: then two may do the same work
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _remove(self, path: Path, why: str) -> None:
        log.warning("embedding %s is damaged (%s): removed, computed again", path, why)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("embedding %s cannot be removed (%s)", path, error)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """crc32 over the tensors' bytes in the order of their names."""
    found = 0
    for name in sorted(tensors):
        flat = tensors[name].contiguous().view(-1)
        found = zlib.crc32(flat.view(torch.uint8).numpy(), found)  # type: ignore[arg-type]
    return found
