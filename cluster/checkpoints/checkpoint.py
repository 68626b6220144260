"""Checkpoints of a run: learner, buffer and driver state of one moment between two steps.

checkpoints/step-000040/
    manifest.json   what is in it, with a checksum of every file and of itself
    buffer.snap     the replay buffer at that moment (buffer_service/transfer/snapshot.py)
    learner/state/  weights, optimiser and random state of every rank (learner/state.py)

It is written while training continues, whole or not at all (store.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from avatar_rl.cluster.checkpoints.store import (
    MANIFEST,
    CheckpointStore,
    Proofs,
    check_files,
    proofs_json,
    prove,
    read_manifest,
    step_folders,
)
from avatar_rl.common.errors import DataError
from avatar_rl.common.types import JsonObject
from avatar_rl.learner.state_replica import FileProof

log = logging.getLogger(__name__)

FORMAT = 1
BUFFER, LEARNER, FOLDER = "buffer.snap", "learner", "checkpoints"


class RoundsState(TypedDict):
    """Where evaluation rounds stand."""

    round: int  # number of the last one
    pending: list[int] | None  # round and step of the one under way
    results: list[dict[str, Any]]  # the finished ones, an Evaluation each


@dataclass(frozen=True)
class Checkpoint:
    """What a manifest says. ``step`` steps are done; the policy is of ``version``."""

    run_id: str
    step: int
    version: int
    model: str  # digest of the model the run started from
    data: str  # digest of the datasets
    metrics_bytes: int  # length of metrics.jsonl at that moment
    evaluation: dict[str, RoundsState]
    accuracies: list[float]  # of the last steps, for the moving average
    files: dict[str, FileProof] = field(default_factory=dict)  # by path below the folder
    path: Path = Path(".")

    @property
    def buffer(self) -> Path:
        return self.path / BUFFER

    @property
    def learner(self) -> Path:
        return self.path / LEARNER

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(proof.bytes for proof in self.files.values())

    def manifest(self) -> JsonObject:
        content = {"format": FORMAT, **asdict(self), "files": proofs_json(self.files)}
        del content["path"]
        return content


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder`` with every file checked. Raises DataError saying what is
    missing, damaged or too new."""
    content = read_manifest(folder)
    if content.pop("format", None) != FORMAT:
        raise DataError(
            f"checkpoint {folder} has another format than {FORMAT}: use the release that wrote it"
        )
    try:
        checkpoint = replace(msgspec.convert(content, Checkpoint), path=folder)
    except msgspec.ValidationError as error:
        raise DataError(f"checkpoint {folder}: {MANIFEST} is damaged ({error})") from error
    check_files(folder, checkpoint.files)
    return checkpoint


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoint folders of a run, newest first."""
    return step_folders(run / FOLDER)


def newest_checkpoint(run: Path, on_damage: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, if there is one; each damaged one is reported and passed
    over."""
    for folder in checkpoints(run):
        try:
            return read_checkpoint(folder)
        except DataError as error:
            on_damage(f"{error}; the checkpoint before is used")
    return None


#: Writes the learner's part below a folder, in the background; returns the proofs of all ranks.
WriteLearner = Callable[[Path], Proofs]
#: Writes the buffer's snapshot; calls the second argument as soon as the moment it shows is fixed.
WriteBuffer = Callable[[Path, Callable[[], None]], object]


class CheckpointWriter:
    """Writes checkpoints of one run in the background, one at a time, and keeps the newest
    ``keep``."""

    def __init__(self, run: Path, *, keep: int, report: Callable[[str, str], None]) -> None:
        self.store, self.keep, self._report = CheckpointStore(run / FOLDER), keep, report
        self.last: Checkpoint | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, checkpoint: Checkpoint, write_learner: WriteLearner, write_buffer: WriteBuffer
    ) -> None:
        """Begin to write ``checkpoint``; returns as soon as training may continue, when the
        buffer's moment is fixed.

        One that is still being written is waited for. A failure is reported and does not stop the
        run.
        """
        self.wait()
        fixed = threading.Event()
        self._thread = threading.Thread(
            target=self._write,
            args=(checkpoint, write_learner, write_buffer, fixed),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()
        fixed.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the one being written; False when it is not done in time."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.busy

    def _write(
        self,
        checkpoint: Checkpoint,
        write_learner: WriteLearner,
        write_buffer: WriteBuffer,
        fixed: threading.Event,
    ) -> None:
        started = time.monotonic()
        whole = checkpoint

        def fill(folder: Path) -> JsonObject:
            nonlocal whole
            write_buffer(folder / BUFFER, fixed.set)
            files = {BUFFER: prove(folder / BUFFER)}
            (folder / LEARNER).mkdir()
            proofs = write_learner(folder / LEARNER)
            files |= {f"{LEARNER}/{path}": proof for path, proof in proofs.items()}
            whole = replace(checkpoint, files=files)
            return whole.manifest()

        try:
            path = self.store.write(checkpoint.step, fill)
            self.last = replace(whole, path=path)
            self.store.prune(path, self.keep)
            self._report(
                "checkpoint written",
                f"step {checkpoint.step}: {whole.size / 1e6:.1f} MB in "
                f"{time.monotonic() - started:.1f} s",
            )
        # A full disk, or a learner that died: the run and older checkpoints are unharmed.
        except Exception as error:
            log.info("checkpoint of step %d failed", checkpoint.step, exc_info=True)
            self._report(
                "checkpoint failed",
                f"step {checkpoint.step}: {error or type(error).__name__}; the run continues",
            )
        finally:
            fixed.set()
