"""Checkpoints of a cold start: whole or not used, the newest only, and a death that is told from an
error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from avatar_rl.cluster.checkpoints.sft_checkpoint import SftCheckpoints
from avatar_rl.cluster.checkpoints.store import MANIFEST
from avatar_rl.learner.state_replica import FileProof, write_files

SETTING = {"ranks": 1, "zero_stage": 0}


def write(folder: Path) -> dict[str, FileProof]:
    return write_files({"model.pt": np.arange(100, dtype=np.uint8)}, folder)


def test_the_newest_is_kept_and_found(tmp_path: Path) -> None:
    saved = SftCheckpoints(tmp_path / "cold-start-1", SETTING)
    assert saved.newest(pytest.fail) is None
    saved.save(20, write)
    saved.save(100, write)
    found = SftCheckpoints(tmp_path / "cold-start-1", SETTING).newest(pytest.fail)
    assert found is not None and found[0] == 100
    assert (found[1] / "state" / "model.pt").read_bytes() == bytes(range(100))
    assert [place.name for place in saved.folder.iterdir()] == ["step-00000100"]
    saved.clear()
    assert list(tmp_path.iterdir()) == []


def change(place: Path) -> None:
    (place / "state" / "model.pt").write_bytes(bytes(100))


def shorten(place: Path) -> None:
    (place / "state" / "model.pt").write_bytes(b"")


def lose(place: Path) -> None:
    (place / "state" / "model.pt").unlink()


def tear(place: Path) -> None:
    (place / MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [change, shorten, lose, tear])
def test_a_damaged_one_is_named_and_not_used(tmp_path: Path, damage: object) -> None:
    saved, said = SftCheckpoints(tmp_path / "cold-start-1", SETTING), []
    saved.save(20, write)
    assert callable(damage)
    damage(saved.folder / "step-00000020")
    assert saved.newest(said.append) is None
    assert len(said) == 1 and "step-00000020 is damaged" in said[0]


def test_one_of_another_number_of_ranks_is_not_used(tmp_path: Path) -> None:
    said: list[str] = []
    SftCheckpoints(tmp_path / "cold-start-1", SETTING).save(20, write)
    assert (
        SftCheckpoints(tmp_path / "cold-start-1", {**SETTING, "ranks": 2}).newest(said.append)
        is None
    )
    assert "was written with {'ranks': 1" in said[0]


def test_a_failed_write_leaves_the_one_before(tmp_path: Path) -> None:
    saved = SftCheckpoints(tmp_path / "cold-start-1", SETTING)
    saved.save(20, write)

    def fails(folder: Path) -> dict[str, FileProof]:
        write(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        saved.save(40, fails)
    found = saved.newest(pytest.fail)
    assert found is not None and found[0] == 20
    assert [place.name for place in saved.folder.iterdir()] == ["step-00000020"]
    assert json.loads((found[1] / MANIFEST).read_text())["content"]["step"] == 20
