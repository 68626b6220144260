"""Checkpoint folders on disk: ``step-N`` with a manifest, whole or absent.

Training and cold start both write theirs through ``CheckpointStore``: into a hidden folder, flushed
to the disk, and renamed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from avatar_rl.common.errors import DataError
from avatar_rl.common.files import sha256_of
from avatar_rl.common.types import JsonObject
from avatar_rl.learner.state_replica import FileProof

MANIFEST = "manifest.json"

Proofs = Mapping[str, FileProof]  # path below a folder -> what the file must read back as


class CheckpointStore:
    """The checkpoint folders of one run, or of one cold start, below ``folder``.

    One process at a time may write; what an earlier one left unfinished is removed.
    """

    def __init__(self, folder: Path, *, digits: int = 6) -> None:
        self.folder, self.digits = folder, digits
        for left in folder.glob(".step-*.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    def folders(self) -> list[Path]:
        """Finished checkpoints, newest first."""
        return step_folders(self.folder)

    def write(self, step: int, fill: Callable[[Path], JsonObject]) -> Path:
        """The folder of a new checkpoint, in place of one of the same step.

        ``fill`` writes the files below the folder it is given and returns the manifest's content.
        What it raises leaves the other checkpoints unharmed; so does an OSError of ours.
        """
        name = f"step-{step:0{self.digits}d}"
        target, scratch = self.folder / name, self.folder / f".{name}.tmp-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            _write_manifest(fill(scratch), scratch)
            for place in (scratch, *scratch.rglob("*")):
                if place.is_dir():
                    _sync_folder(place)
            before = scratch.with_name(f"{scratch.name}-before")
            if target.exists():  # from before a restart: out of the way first, removing takes long
                target.rename(before)
            scratch.rename(target)
            _sync_folder(self.folder)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def prune(self, newest: Path, keep: int) -> None:
        """Keep ``keep`` folders up to ``newest``. Later ones were passed over, as damaged perhaps:
        they take nobody's place."""
        ours = [path for path in self.folders() if path.name <= newest.name]
        for old in ours[keep:]:
            shutil.rmtree(old, ignore_errors=True)


def step_folders(folder: Path) -> list[Path]:
    """Finished checkpoints below ``folder``, newest first."""
    return sorted(folder.glob("step-*"), key=lambda path: path.name, reverse=True)


def read_manifest(folder: Path) -> JsonObject:
    """A manifest's content, checked against its own digest. Raises DataError."""
    try:
        document = json.loads((folder / MANIFEST).read_text())
        content = document["content"]
        whole = isinstance(content, dict) and document["sha256"] == _digest(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"checkpoint {folder}: {MANIFEST} is missing or damaged ({error})"
        ) from error
    if not whole:
        raise DataError(f"checkpoint {folder}: {MANIFEST} is damaged (checksum differs)")
    return content


def check_files(folder: Path, files: Proofs) -> None:
    """Every file below ``folder`` against its proof. Raises DataError naming the one at fault."""
    for name, proof in files.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"checkpoint {folder}: {name} is missing")
        if file.stat().st_size != proof.bytes or sha256_of(file) != proof.sha256:
            raise DataError(f"checkpoint {folder}: {name} is damaged (size or checksum differs)")


def prove(file: Path) -> FileProof:
    """What ``file`` must read back as."""
    return FileProof(file.stat().st_size, sha256_of(file))


def proofs_json(files: Proofs) -> JsonObject:
    """As a manifest holds them."""
    return {name: asdict(proof) for name, proof in sorted(files.items())}


def _write_manifest(content: JsonObject, folder: Path) -> None:
    text = json.dumps({"sha256": _digest(content), "content": content}, indent=1)
    with open(folder / MANIFEST, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _digest(content: JsonObject) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
