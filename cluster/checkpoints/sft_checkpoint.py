"""Checkpoints of a cold start under way: beside its place in the cache, so that whoever needs it
next goes on there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avatar_rl.cluster.checkpoints.checkpoint import check_files, sync_folder
from avatar_rl.common.errors import DataError
from avatar_rl.learner.state_replica import FileProof

MANIFEST = "manifest.json"
Setting = Mapping[str, int]  # ranks and ZeRO stage: what the files were written by


class SftCheckpoints:
    """Folders ``step-N`` in ``<cold start>.partial/``, each whole or absent; only the newest is
    kept."""

    def __init__(self, result: Path, setting: Setting) -> None:
        self.folder = result.with_name(result.name + ".partial")
        self.setting = dict(setting)

    def newest(self, on_damage: Callable[[str], None]) -> tuple[int, Path] | None:
        """Steps done and the folder with the learner's state; None to begin at the beginning.

        One that is damaged or was written by another number of ranks is reported and passed over.
        """
        for place in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                manifest = json.loads((place / MANIFEST).read_text())
                if manifest["setting"] != self.setting:
                    on_damage(
                        f"{place} was written with {manifest['setting']}, this is {self.setting}: "
                        "not used"
                    )
                    continue
                check_files(place, manifest["files"])
                return int(manifest["step"]), place
            except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                on_damage(f"{place} is damaged ({error}): not used")
        return None

    def save(self, step: int, write: Callable[[Path], Mapping[str, FileProof]]) -> None:
        """``write`` puts the learner's state of ``step`` below the folder it is given and proves
        it. Raises OSError."""
        place, scratch = (
            self.folder / f"step-{step:08d}",
            self.folder / f".step-{step:08d}.tmp-{os.getpid()}",
        )
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            files = {name: asdict(proof) for name, proof in write(scratch.resolve()).items()}
            document: dict[str, Any] = {"step": step, "setting": self.setting, "files": files}
            with open(scratch / MANIFEST, "w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(place, ignore_errors=True)
            scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        sync_folder(self.folder)
        for old in self.folder.glob("step-*"):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """The cold start is done, its result stands in the cache."""
        shutil.rmtree(self.folder, ignore_errors=True)
