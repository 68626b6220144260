"""Checkpoints: learner, buffer and the driver's own books as one checkpoint between two steps,
whole on disk or not at all.

checkpoints/step-000040/
    manifest.json   what is in it, with a checksum of every file and of itself
    buffer.snap     the replay buffer at that moment (buffer_service/transfer/snapshot.py)
    learner/state/  weights, optimiser and random state of every rank (learner/state.py)

It is written beside the training into a hidden folder, flushed, and renamed at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from avatar_rl.common.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, BUFFER, LEARNER, FOLDER = "manifest.json", "buffer.snap", "learner", "checkpoints"
BLOCK = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """What a manifest says. ``step`` steps are done; the policy is of ``version``."""

    run_id: str
    step: int
    version: int
    model: str  # digest of the model the run started from
    data: str  # digest of the datasets
    metrics_bytes: int  # length of metrics.jsonl at the checkpoint
    evaluation: dict[str, Any]  # EvaluationRounds.state by name
    accuracies: list[float]  # of the last steps, for the moving average
    files: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # path below the folder -> bytes, sha256
    path: Path = Path(".")

    @property
    def buffer(self) -> Path:
        return self.path / BUFFER

    @property
    def learner(self) -> Path:
        return self.path / LEARNER


def write_manifest(checkpoint: Checkpoint, folder: Path) -> None:
    """manifest.json, which proves itself by a digest of its content."""
    content = {"format": FORMAT, **asdict(checkpoint)}
    del content["path"]
    text = json.dumps({"sha256": _digest(content), "content": content}, indent=1)
    with open(folder / MANIFEST, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(folder: Path) -> Checkpoint:
    """The cut in ``folder`` with every file checked. Raises DataError saying what is missing,
    damaged or too new."""
    try:
        document = json.loads((folder / MANIFEST).read_text())
        content = document["content"]
        if document["sha256"] != _digest(content):
            raise DataError(f"checkpoint {folder}: {MANIFEST} is damaged (checksum differs)")
        if content.pop("format") != FORMAT:
            raise DataError(
                f"checkpoint {folder} has another format than {FORMAT}: use the release that "
                "wrote it"
            )
        checkpoint = Checkpoint(**content, path=folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"checkpoint {folder}: {MANIFEST} is missing or damaged ({error})"
        ) from error
    check_files(folder, checkpoint.files)
    return checkpoint


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Every file below ``folder`` against its proof (bytes, sha256). Raises DataError naming the
    one at fault."""
    for name, proof in files.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"checkpoint {folder}: {name} is missing")
        if file.stat().st_size != proof["bytes"] or sha256(file) != proof["sha256"]:
            raise DataError(f"checkpoint {folder}: {name} is damaged (size or checksum differs)")


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoint folders of a run, newest first."""
    return sorted((run / FOLDER).glob("step-*"), key=lambda path: path.name, reverse=True)


def newest_checkpoint(run: Path, on_damage: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; each damaged one is reported and passed over. None when there is
    none."""
    for folder in checkpoints(run):
        try:
            return read_checkpoint(folder)
        except DataError as error:
            on_damage(f"{error}; the checkpoint before is used")
    return None


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


#: Writes the learner's part below a folder, in the background; returns path -> FileProof of every
#: rank.
WriteLearner = Callable[[Path], dict[str, Any]]
#: Writes the buffer's snapshot; calls the second argument as soon as the moment it shows is fixed.
WriteBuffer = Callable[[Path, Callable[[], None]], Any]


class CheckpointWriter:
    """Writes cuts of one run, one at a time, and removes those beyond ``keep``."""

    def __init__(self, run: Path, *, keep: int, report: Callable[[str, str], None]) -> None:
        self.folder, self.keep, self._report = run / FOLDER, keep, report
        self.last: Checkpoint | None = None
        self._thread: threading.Thread | None = None
        for left in self._unfinished():
            shutil.rmtree(left, ignore_errors=True)

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, checkpoint: Checkpoint, write_learner: WriteLearner, write_buffer: WriteBuffer
    ) -> None:
        """Begin writing ``checkpoint``; returns as soon as training may go on: when the buffer's
        moment is fixed. One that is still being written is waited for. What goes wrong is reported,
        and does not stop the run."""
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

    # -- the thread --------------------------------------------------------------------------------

    def _write(
        self,
        checkpoint: Checkpoint,
        write_learner: WriteLearner,
        write_buffer: WriteBuffer,
        fixed: threading.Event,
    ) -> None:
        started = time.monotonic()
        name = f"step-{checkpoint.step:06d}"
        scratch = self.folder / f".{name}.tmp-{os.getpid()}"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / LEARNER).mkdir(parents=True)
            write_buffer(scratch / BUFFER, fixed.set)
            files: dict[str, dict[str, Any]] = {
                BUFFER: {
                    "bytes": (scratch / BUFFER).stat().st_size,
                    "sha256": sha256(scratch / BUFFER),
                }
            }
            proofs = write_learner(scratch / LEARNER)
            files |= {f"{LEARNER}/{path}": asdict(proof) for path, proof in sorted(proofs.items())}
            whole = Checkpoint(**{**asdict(checkpoint), "files": files, "path": self.folder / name})
            write_manifest(whole, scratch)
            for folder in (scratch / LEARNER / "state", scratch / LEARNER, scratch):
                if folder.is_dir():
                    sync_folder(folder)
            self._replace(scratch, whole.path)
            self.last = whole
            self._prune(whole.path)
            size = sum(proof["bytes"] for proof in files.values())
            self._report(
                "checkpoint written",
                f"step {checkpoint.step}: {size / 1e6:.1f} MB in {time.monotonic() - started:.1f} "
                "s",
            )
        # a full disk, a learner that died meanwhile: the run and older checkpoints are unharmed
        except Exception as error:
            log.info("checkpoint of step %d failed", checkpoint.step, exc_info=True)
            shutil.rmtree(scratch, ignore_errors=True)
            self._report(
                "checkpoint failed",
                f"step {checkpoint.step}: {error or type(error).__name__}; the run goes on",
            )
        finally:
            fixed.set()

    def _replace(self, scratch: Path, target: Path) -> None:
        before = scratch.with_name(f"{scratch.name}-before")
        if (
            target.exists()
        ):  # of a life before that came this far: out of the way first, for removing it takes long
            target.rename(before)
        scratch.rename(target)
        sync_folder(self.folder)
        shutil.rmtree(before, ignore_errors=True)

    def _unfinished(self) -> Iterator[Path]:
        return self.folder.glob(".step-*.tmp-*")

    def _prune(self, newest: Path) -> None:
        """What lies beyond ``newest`` was passed over by this life, as damaged say: it takes
        nobody's place."""
        ours = [path for path in checkpoints(self.folder.parent) if path.name <= newest.name]
        for old in ours[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
