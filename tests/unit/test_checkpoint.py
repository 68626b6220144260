"""Checkpoints are whole or absent, prove themselves, and are written beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatar_rl.cluster.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from avatar_rl.cluster.checkpoints.store import MANIFEST
from avatar_rl.common.errors import DataError
from avatar_rl.learner.state_replica import Files, StateReplica, write_files


def a_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        "run-1",
        step,
        step,
        "model",
        "data",
        100,
        {"heldout": {"round": 1, "pending": [1, 4], "results": []}},
        [0.5],
    )


def a_state(seed: int = 0) -> Files:
    return {"model.pt": np.random.default_rng(seed).integers(0, 256, 5000, dtype=np.uint8)}


def write_buffer(path: Path, fixed: Callable[[], None]) -> None:
    fixed()
    path.write_bytes(b"snapshot" * 100)


def write_learner(folder: Path) -> dict[str, Any]:
    return write_files(a_state(), folder)


class Diary:
    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []

    def __call__(self, kind: str, message: str) -> None:
        self.entries.append((kind, message))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.entries]


def write(run: Path, *steps: int, keep: int = 10) -> Diary:
    diary = Diary()
    checkpointer = CheckpointWriter(run, keep=keep, report=diary)
    for step in steps:
        checkpointer.begin(a_checkpoint(step), write_learner, write_buffer)
        checkpointer.wait()
    return diary


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    diary = write(tmp_path, 4)
    checkpoint = newest_checkpoint(tmp_path, pytest.fail)
    assert checkpoint is not None
    assert (
        checkpoint.step,
        checkpoint.version,
        checkpoint.evaluation["heldout"]["pending"],
        checkpoint.accuracies,
    ) == (
        4,
        4,
        [1, 4],
        [0.5],
    )
    assert checkpoint.buffer.read_bytes() == b"snapshot" * 100
    assert (checkpoint.learner / "state" / "model.pt").read_bytes() == a_state()[
        "model.pt"
    ].tobytes()
    assert diary.kinds == ["checkpoint written"]


def test_old_checkpoints_go(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6, 8, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000008", "step-000006"]


@pytest.mark.parametrize("name", ["buffer.snap", "learner/state/model.pt", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    write(tmp_path, 4, 8)
    file = checkpoints(tmp_path)[0] / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        middle = content.index(b'"version": 8') + 11 if name == MANIFEST else len(content) // 2
        content[middle] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    said: list[str] = []
    checkpoint = newest_checkpoint(tmp_path, said.append)
    assert checkpoint is not None and checkpoint.step == 4
    [message] = said
    assert "step-000008" in message and name in message


def test_a_damaged_checkpoint_that_was_passed_over_does_not_displace_newer_work(
    tmp_path: Path,
) -> None:
    write(tmp_path, 8)
    (tmp_path / "checkpoints" / "step-000008" / "buffer.snap").unlink()
    write(tmp_path, 2, 4, keep=1)  # of the life that began before it
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000008", "step-000004"]
    found = newest_checkpoint(tmp_path, lambda _: None)
    assert found is not None and found.step == 4
    write(tmp_path, 8, keep=1)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found.step == 8
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000008"]


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    write(tmp_path, 4)
    (checkpoints(tmp_path)[0] / "buffer.snap").unlink()
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None and len(said) == 1


def test_training_goes_on_once_the_moment_is_fixed(tmp_path: Path) -> None:
    go_on = threading.Event()

    def slow(folder: Path) -> dict[str, Any]:
        assert go_on.wait(10)
        return write_learner(folder)

    checkpointer = CheckpointWriter(tmp_path, keep=2, report=Diary())
    checkpointer.begin(a_checkpoint(4), slow, write_buffer)
    assert (
        checkpointer.busy and checkpoints(tmp_path) == []
    )  # nothing to be seen of it before it is whole
    assert not checkpointer.wait(0.01)
    go_on.set()
    assert checkpointer.wait(10)
    assert [read_checkpoint(folder).step for folder in checkpoints(tmp_path)] == [4]


def test_a_failure_is_reported_and_leaves_the_others_alone(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    diary = Diary()
    checkpointer = CheckpointWriter(tmp_path, keep=2, report=diary)
    checkpointer.begin(a_checkpoint(4), write_learner, write_buffer)
    checkpointer.begin(a_checkpoint(8), full, write_buffer)
    checkpointer.wait()
    assert diary.kinds == ["checkpoint written", "checkpoint failed"]
    assert "No space left" in diary.entries[1][1]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_a_snapshot_that_fails_does_not_hold_up_the_training(tmp_path: Path) -> None:
    def away(path: Path, fixed: Callable[[], None]) -> None:
        raise ConnectionError("Redis is away")

    diary = Diary()
    checkpointer = CheckpointWriter(tmp_path, keep=2, report=diary)
    checkpointer.begin(a_checkpoint(4), write_learner, away)
    checkpointer.wait()
    assert diary.kinds == ["checkpoint failed"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-000004.tmp-123"
    left.mkdir(parents=True)
    CheckpointWriter(tmp_path, keep=2, report=Diary())
    assert not left.exists() and newest_checkpoint(tmp_path, pytest.fail) is None


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avatar_rl.cluster.checkpoints.checkpoint.FORMAT", 2)
    write(tmp_path, 4)
    monkeypatch.setattr("avatar_rl.cluster.checkpoints.checkpoint.FORMAT", 1)
    with pytest.raises(DataError, match="another format"):
        read_checkpoint(checkpoints(tmp_path)[0])


# -- the state replica
# ------------------------------------------------------------------------------------


def test_the_replica_holds_the_newest_two_versions_of_all_ranks(tmp_path: Path) -> None:
    state_replica = StateReplica(ranks=2)
    for version in (1, 2, 3):
        for rank in (0, 1):
            state_replica.store(version, rank, {f"rank{rank}.pt": a_state(version)["model.pt"]})
    state_replica.store(4, 0, a_state())  # its other half never came: the group died in between
    assert state_replica.versions() == [3]
    assert state_replica.write(4, tmp_path) is None
    proofs = state_replica.write(3, tmp_path)
    assert proofs is not None and sorted(proofs) == ["state/rank0.pt", "state/rank1.pt"]
    assert (tmp_path / "state" / "rank1.pt").read_bytes() == a_state(3)["model.pt"].tobytes()


def test_a_pinned_version_stays_until_it_is_written(tmp_path: Path) -> None:
    state_replica = StateReplica(ranks=1)
    state_replica.store(1, 0, a_state(1))
    assert state_replica.pin(1) and not StateReplica(ranks=1).pin(1)
    for version in (2, 3, 4):
        state_replica.store(version, 0, a_state(version))
    assert state_replica.write(1, tmp_path) is not None
    assert state_replica.write(1, tmp_path) is None


def test_the_replica_keeps_a_copy_of_its_own(tmp_path: Path) -> None:
    """What it is sent lies in the object store, where two states leave no room for a third."""
    state_replica, sent = StateReplica(ranks=1), a_state(1)
    state_replica.store(1, 0, sent)
    sent["model.pt"][:] = 0
    state_replica.write(1, tmp_path)
    assert (tmp_path / "state" / "model.pt").read_bytes() == a_state(1)["model.pt"].tobytes()
