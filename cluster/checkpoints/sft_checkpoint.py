"""Checkpoints of a cold start: beside its place in the cache, so that the next run that needs it
resumes there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from avatar_rl.cluster.checkpoints.store import (
    CheckpointStore,
    Proofs,
    check_files,
    proofs_json,
    read_manifest,
)
from avatar_rl.common.errors import DataError
from avatar_rl.common.types import JsonObject
from avatar_rl.learner.state_replica import FileProof


class _Manifest(msgspec.Struct):
    step: int
    setting: dict[str, int]
    files: dict[str, FileProof]


class SftCheckpoints:
    """Folders ``step-N`` in ``<cold start>.partial/``; only the newest is kept.

    Args:
        result: Where the finished cold start will lie.
        setting: Ranks and ZeRO stage; files that were written by another setting are not used.
    """

    def __init__(self, result: Path, setting: Mapping[str, int]) -> None:
        self.store = CheckpointStore(result.with_name(result.name + ".partial"), digits=8)
        self.setting = dict(setting)

    @property
    def folder(self) -> Path:
        return self.store.folder

    def newest(self, on_damage: Callable[[str], None]) -> tuple[int, Path] | None:
        """Steps done and the folder with the learner's state; None where there is nothing to
        resume.

        One that is damaged or was written by another setting is reported and passed over.
        """
        for place in self.store.folders():
            try:
                manifest = msgspec.convert(read_manifest(place), _Manifest)
                if manifest.setting != self.setting:
                    on_damage(
                        f"{place} was written with {manifest.setting}, this is {self.setting}: not "
                        "used"
                    )
                    continue
                check_files(place, manifest.files)
                return manifest.step, place
            except (DataError, OSError, msgspec.ValidationError) as error:
                on_damage(f"{place} is damaged ({error}): not used")
        return None

    def save(self, step: int, write: Callable[[Path], Proofs]) -> None:
        """``write`` puts the learner's state of ``step`` below the folder it is given. Raises
        OSError."""

        def fill(folder: Path) -> JsonObject:
            files = proofs_json(write(folder.resolve()))
            return {"step": step, "setting": {**self.setting}, "files": files}

        self.store.prune(self.store.write(step, fill), keep=1)

    def clear(self) -> None:
        """The cold start is done; its result is in the cache."""
        shutil.rmtree(self.folder, ignore_errors=True)
