"""The run folder: everything a run leaves behind, written so that a crash or a full disk tears
nothing.

runs/<id>/config.yaml        resolved configuration, secrets masked
          environment.json   Python, platform and package versions
          status.json        state, step and headline numbers, replaced atomically
          metrics.jsonl      one JSON object per step (names: metrics.py; NaN becomes null)
          distributions.jsonl  advantages and loss by position, a row per step
          events.jsonl       what happened: actors, versions, quarantines, warnings
          samples/           completions with every reward component, as JSONL and as Markdown
          tensorboard/       the same scalars as metrics.jsonl
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, SupportsFloat, TypedDict, Unpack

from avatar_rl.cluster.telemetry.run_files import (
    DISTRIBUTIONS,
    RunStatus,
    State,
    environment,
    mask_secrets,
    read_status,
    rewind,
)
from avatar_rl.cluster.telemetry.samples import rotate, sample_lines, samples_markdown
from avatar_rl.cluster.telemetry.sinks import Sink
from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.common.files import Appender, json_line, replace_text
from avatar_rl.common.plain_yaml import plain_yaml
from avatar_rl.common.types import ReadOnlyJson

log = logging.getLogger(__name__)

#: A run does not start with less free disk than this; checkpoints need far more, but logs must
#: always fit.
MIN_FREE_BYTES = 64 << 20
#: Bound of samples/ where nobody says another (output.samples_mib).
SAMPLES_BYTES = 256 << 20


class StatusChanges(TypedDict, total=False):
    """Fields of RunStatus that change during a run."""

    state: State
    phase: str
    step: int
    total_steps: int | None
    accuracy_before: float | None
    accuracy_now: float | None
    reward: float | None
    error: str | None


class RunFolder:
    """One run's folder. Thread-safe; one writer process per run.

    A new folder refuses to overwrite an existing one (ConfigError) and to start where nothing can
    be written (ResourceError). With ``resume_step`` an existing folder is continued: metrics past
    that step are set aside, since the steps will be run again. Once open, a disk that fills up
    costs one warning, never the run: records wait in memory and are written as soon as there is
    room."""

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int | None = None,
        total_steps: int | None = None,
        on_warning: Callable[[str], None] | None = None,
        sinks: Sequence[Sink] = (),
        samples_bytes: int = SAMPLES_BYTES,
    ) -> None:
        self.path = path
        self.samples_bytes = samples_bytes
        self.degraded = False
        self._failures = 0
        self._on_warning = on_warning or (lambda _: None)
        self._sinks = list(sinks)
        self._lock = threading.RLock()
        try:
            if resume_step is None:
                self._create()
            else:
                rewind(path, resume_step)
            self._metrics = Appender(path / "metrics.jsonl", self._trouble)
            self._distributions = Appender(path / DISTRIBUTIONS, self._trouble)
            self._events = Appender(path / "events.jsonl", self._trouble)
            self._tensorboard = Appender(event_file(path / "tensorboard"), self._trouble)
        except OSError as error:
            raise ResourceError(_disk_message(path, error)) from error
        now = time.time()
        fresh = RunStatus(
            run_id=path.name, started=now, updated=now, host=socket.gethostname(), pid=os.getpid()
        )
        if resume_step is not None:
            before = read_status(path)
            fresh.accuracy_before, fresh.accuracy_now = before.accuracy_before, before.accuracy_now
            fresh.step = resume_step
        fresh.total_steps = total_steps
        self._status = fresh
        self.status()
        self._tensorboard.append(scalar_event(resume_step or 0, {}, start=True))

    def _create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < MIN_FREE_BYTES:
            raise ResourceError(
                f"run folder {self.path}: only {free >> 20} MiB of disk are free, "
                f"{MIN_FREE_BYTES >> 20} are needed; "
                "free some space or set output.folder"
            )
        try:
            self.path.mkdir()
        except FileExistsError as error:
            raise ConfigError(
                f"run folder {self.path} exists already and is not overwritten; choose another "
                "name or resume the run"
            ) from error
        (self.path / "samples").mkdir()
        (self.path / "tensorboard").mkdir()
        replace_text(self.path / "environment.json", json.dumps(environment(), indent=1))

    # -- writing -----------------------------------------------------------------------------------

    def config(self, resolved: Mapping[str, ReadOnlyJson]) -> None:
        """Write the resolved configuration (JSON-ready values), secrets masked."""
        self._guarded(
            self.path / "config.yaml",
            plain_yaml(mask_secrets(resolved)),
        )

    def metrics(
        self, step: int, values: Mapping[str, SupportsFloat | None]
    ) -> dict[str, float | None]:
        """Append one step's metrics and return them as stored: floats, null for NaN and infinity.

        Steps count from 1; the evaluation before training is step 0. Further calls for a step add
        to it."""
        if step < 0:
            raise ValueError(f"metrics of step {step}: steps are not negative")
        clean = {
            name: _finite(name, value)
            for name, value in sorted(values.items())
            if name not in ("step", "timestamp")
        }
        row = {"step": step, "timestamp": round(time.time(), 3), **clean}
        with self._lock:
            failures = self._failures
            self._metrics.append(json_line(row))
            self._tensorboard.append(scalar_event(step, clean))
            self._events.flush()
            status: StatusChanges = {"step": max(step, self._status.step)}
            if clean.get("reward/mean") is not None:
                status["reward"] = clean["reward/mean"]
            if (accuracy := clean.get("eval/accuracy")) is not None:
                status["accuracy_now"] = accuracy
                if self._status.accuracy_before is None:
                    status["accuracy_before"] = accuracy
            self.status(**status)
            if self.degraded and failures == self._failures:
                self.degraded = False
                self._warn(
                    f"run folder {self.path} can be written again; waiting records were saved"
                )
        for sink in self._sinks:
            sink.write(step, clean)
        return clean

    def distributions(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Append one step's histograms and profiles by name
        (``avatar_rl.learner.objective.step_metrics.StepMetrics.distributions``)."""
        if values:
            with self._lock:
                self._distributions.append(json_line({"step": step, **values}))

    def event(self, kind: str, message: str, **fields: str | int | float | bool | None) -> None:
        """Append an event: ``kind`` is a short noun phrase such as "actor died" or "version
        published"."""
        row = {
            "timestamp": round(time.time(), 3),
            "step": self._status.step,
            "kind": kind,
            "message": message,
            **fields,
        }
        with self._lock:
            self._events.append(json_line(row))

    def samples(
        self,
        step: int,
        rows: Sequence[Mapping[str, object]],
        kind: Literal["rollout", "eval"] = "rollout",
    ) -> Path:
        """Write sampled completions (``Sample``), one row each, as JSONL and as readable Markdown;
        returns the JSONL path. Older ones make room (samples.py)."""
        stem = "step" if kind == "rollout" else "eval"
        path = self.path / "samples" / f"{stem}_{step:06d}.jsonl"
        with self._lock:
            self._guarded(path, sample_lines(rows, self.samples_bytes).decode())
            self._guarded(path.with_suffix(".md"), samples_markdown(step, rows, kind))
            try:
                rotate(path.parent, self.samples_bytes)
            except OSError as error:
                self._trouble(error)
        for sink in self._sinks:
            sink.samples(step, kind, rows)
        return path

    def status(self, **changes: Unpack[StatusChanges]) -> RunStatus:
        """Change fields of status.json (see RunStatus) and rewrite it atomically."""
        with self._lock:
            for name, value in changes.items():
                setattr(self._status, name, value)
            self._status.updated = round(time.time(), 3)
            self._guarded(self.path / "status.json", self._status.model_dump_json(indent=1))
            return self._status.model_copy()

    def send_to(self, sinks: Sequence[Sink]) -> None:
        """Further sinks, from now on; they may write into the folder."""
        self._sinks += sinks

    def phase(self, name: str) -> None:
        """What the run does now, for `avatar runs`."""
        self.status(phase=name)

    def close(self) -> None:
        """Close all files; records that never fitted on the disk are named in a warning."""
        with self._lock:
            files = (self._metrics, self._distributions, self._events, self._tensorboard)
            for file in files:
                file.flush()
            short = {
                file.path.name: file.pending + file.lost
                for file in files
                if file.pending + file.lost
            }
            if short:
                self._warn(
                    f"run folder {self.path}: records lost because the disk stayed full: {short}"
                )
            for file in files:
                file.close()
            for sink in self._sinks:
                sink.close()

    # -- a disk that fills up ----------------------------------------------------------------------

    def _guarded(self, path: Path, text: str) -> None:
        try:
            replace_text(path, text)
        except OSError as error:
            self._trouble(error)

    def _trouble(self, error: OSError) -> None:
        self._failures += 1
        if not self.degraded:
            self.degraded = True
            self._warn(
                _disk_message(self.path, error) + "; training continues, records wait in memory"
            )

    def _warn(self, message: str) -> None:
        log.warning(message)
        self._on_warning(message)


def new_run_id(name: str) -> str:
    """``name-YYYYMMDD-HHMMSS-ffffff`` in local time: runs that begin in one second differ."""
    seconds, fraction = divmod(time.time_ns(), 1_000_000_000)
    at = time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))
    return f"{name}-{at}-{fraction // 1000:06}"


def event_file(folder: Path) -> Path:
    seconds = time.time_ns() // 1_000_000_000
    return folder / f"events.out.tfevents.{seconds}.{socket.gethostname()}.{os.getpid()}"


def scalar_event(step: int, metrics: Mapping[str, float | None], start: bool = False) -> bytes:
    """One TensorBoard record (no torch, no TensorFlow). ``start`` opens a file and purges re-run
    steps."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    values = [
        Summary.Value(tag=name, simple_value=value)
        for name, value in metrics.items()
        if value is not None
    ]
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    if start:
        writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        log_start = SessionLog(status=SessionLog.START)
        writer.write(
            Event(wall_time=time.time(), step=step + 1, session_log=log_start).SerializeToString()
        )
    else:
        writer.write(
            Event(
                wall_time=time.time(), step=step, summary=Summary(value=values)
            ).SerializeToString()
        )
    return buffer.getvalue()


def _finite(name: str, value: SupportsFloat | None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric '{name}' is {value!r}; metrics are numbers or None") from error
    return number if math.isfinite(number) else None


def _disk_message(path: Path, error: OSError) -> str:
    return (
        f"run folder {path} cannot be written ({error.strerror or error}); free disk space or "
        "set output.folder"
    )
