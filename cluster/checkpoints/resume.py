"""Resuming a run: which one, whether the recipe still fits, and its folder put back to the
checkpoint."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from avatar_rl.cluster.checkpoints.checkpoint import Checkpoint, checkpoints, newest_checkpoint
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.config import LoopConfig, RunConfig
from avatar_rl.cluster.recipe.assets import Datasets
from avatar_rl.cluster.recipe.content import model_digest
from avatar_rl.cluster.telemetry.run_files import MASK, list_runs, mask_secrets, read_status
from avatar_rl.cluster.telemetry.run_folder import SAMPLES_BYTES, RunFolder
from avatar_rl.cluster.telemetry.sinks import Sink
from avatar_rl.common.config import current_keys
from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.common.plain_yaml import parse_plain
from avatar_rl.common.types import Json, JsonObject, ReadOnlyJson
from avatar_rl.learner.config import LearnerConfig

#: When a run ends.
UNTIL = ("loop.steps", "loop.target_accuracy", "evaluation")
#: Keys that may differ from those the run began with: they change how it runs, not what it
#: computes. So may ``UNTIL``, to train longer; a learning-rate schedule that depends on the number
#: of steps then follows the new length.
HARMLESS = (
    "name",
    "preset",
    "screen",
    "output",
    "evaluation",
    "probe",
    "resources",
    "checkpoint",
    "supervision",
    "loop.steps",
    "loop.target_accuracy",
    "loop.step_timeout_s",
    "weights",
    "rollout.workers",
    "rollout.min_workers",
    "rollout.max_workers",
    "rollout.autoscale",
    "rollout.drain_s",
    "rollout.lease_s",
    "rollout.stored_embeddings",
    "rollout.max_sequences",
    "rollout.engine.gpu_memory_utilization",
    "rollout.engine.max_num_seqs",
    "rollout.engine.media_workers",
    "rewards.judge.base_url",
    "learner.micro_batch_tokens",
    "learner.gradient_checkpointing",
    "learner.sequence_parallel",
    "learner.embeddings",
    "learner.lease_s",
    "learner.threads",
    "learner.warmup_steps",
    "learner.reference_cache",
    "learner.max_skipped",
    # Where model and data lie; ``check_assets`` compares what they hold.
    "model.path",
    "data.train",
    "data.heldout",
    "data.sft",
    "data.reader.media_root",
    "cold_start.checkpoint_every",
    "cold_start.micro_batch_tokens",
    "data.media.roots",
    "data.media.threads",
    "data.media.memory_cache_bytes",
    "data.media.disk_cache",
    "data.media.disk_cache_bytes",
    "data.template.cache_bytes",
    "buffer.url",
    "buffer.username",
    "buffer.password_env",
    "buffer.password_file",
    "buffer.tls_ca",
    "buffer.reconnect_s",
    "buffer.pause_s",
    "buffer.timeout_s",
    "buffer.memory_limit",
    "buffer.appendfsync",
)


@dataclass(frozen=True)
class Resumption:
    """A run to resume."""

    run: Path
    checkpoint: Checkpoint | None  # None: it ended before its first checkpoint and begins again

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.checkpoint.step if self.checkpoint is not None else 0

    def __str__(self) -> str:
        where = (
            "from the beginning: it has no checkpoint"
            if self.checkpoint is None
            else f"from step {self.checkpoint.step}"
        )
        return f"resuming {self.run.name} {where}"


def named_run(parent: Path, wanted: str) -> Path | None:
    """The folder of a run by its path or by its id below ``parent``."""
    return next(
        (path for path in (Path(wanted), parent / wanted) if (path / "status.json").is_file()), None
    )


def find_run(parent: Path, wanted: str, name: str, *, asked: str = "--resume") -> Path | None:
    """The folder of ``wanted``: a path, a run id below ``parent``, or "auto" for the newest
    unfinished run of ``name`` (of any, where that is empty); one that failed before its first step
    only where there is no other.

    None when "auto" finds nothing to resume. Raises ConfigError, which begins with what ``asked``
    for the run, when a named one does not exist."""
    if wanted == "auto":
        ours = re.compile(re.escape(name) + r"-[0-9-]+" if name else ".*")
        open_ones = [
            s for s in list_runs(parent) if ours.fullmatch(s.run_id) and s.state != "finished"
        ]
        begun = [
            s
            for s in open_ones
            if s.state != "failed" or s.step > 0 or checkpoints(parent / s.run_id)
        ]
        found = [*begun, *open_ones]
        return parent / found[0].run_id if found else None
    if (run := named_run(parent, wanted)) is not None:
        return run
    known = ", ".join(status.run_id for status in list_runs(parent)[:5]) or "none"
    raise ConfigError(f"{asked} {wanted}: there is no such run below {parent} (newest: {known})")


def saved_config(run: Path) -> JsonObject:
    """config.yaml of a run folder, under today's keys. Raises DataError when it is missing or no
    mapping."""
    file = run / "config.yaml"
    try:
        found = parse_plain(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DataError(
            f"{file} cannot be read ({error}): restore it, or start a new run"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{file} is not a recipe: restore it, or start a new run")
    return current_keys(RunConfig, found, recorded=True)


def reusable_config(run: Path) -> JsonObject:
    """The run's own recipe, to resume it with. Raises ConfigError when it held secrets, which are
    not written down."""
    found = saved_config(run)
    masked = [key for key, value in flatten(found) if isinstance(value, str) and MASK in value]
    if masked:
        raise ConfigError(
            f"{run / 'config.yaml'} has {', '.join(masked)} masked: use `avatar train RECIPE "
            f"--resume {run.name}`"
        )
    return found


def flatten(value: ReadOnlyJson, prefix: str = "") -> Iterator[tuple[str, ReadOnlyJson]]:
    """(dotted key, leaf) pairs of nested mappings; lists are leaves, as in a recipe's overrides."""
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from flatten(value[key], f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def differences(before: ReadOnlyJson, now: ReadOnlyJson) -> list[str]:
    """What of two configurations differs and matters: "key: before -> now"."""
    old, new = dict(flatten(before)), dict(flatten(now))
    found = []
    for key in sorted(old.keys() | new.keys()):
        if any(key == harmless or key.startswith(harmless + ".") for harmless in HARMLESS):
            continue
        left, right = old.get(key, "-"), new.get(key, "-")
        if left != right:
            found.append(f"{key}: {left} -> {right}")
    return found


def check_recipe(run: Path, config: RunConfig) -> None:
    """Raises ConfigError listing the keys that changed and must not."""
    changed = differences(_in_todays_keys(run), mask_secrets(config.model_dump(mode="json")))
    if changed:
        raise ConfigError(
            f"run {run.name} cannot resume with another recipe:\n  " + "\n  ".join(changed) + "\n"
            "put these keys back (steps, output, evaluation, resources and workers may change), "
            "or start a new run"
        )


def _in_todays_keys(run: Path) -> Json:
    """The run's recipe; a key that came later has its default, which is how the run behaved."""
    saved = saved_config(run)
    try:
        return mask_secrets(RunConfig.recorded(saved).model_dump(mode="json"))
    except (ValidationError, ConfigError):  # the comparison names what is not of today
        return saved


def prepare(config: RunConfig, wanted: str, on_message: Callable[[str], None]) -> Resumption | None:
    """The run to resume and its newest whole checkpoint; None when "auto" finds none.

    Raises ConfigError (no such run, another recipe, nothing left to do).
    """
    run = find_run(config.output.folder, wanted, config.name)
    if run is None:
        on_message("nothing to resume: a new run is started")
        return None
    resumption = resumable(run, config, on_message)
    checkpoint = resumption.checkpoint
    if (
        checkpoint is not None
        and checkpoint.step >= config.loop.steps
        and read_status(run).state == "finished"
    ):
        raise ConfigError(
            f"run {run.name} is finished after {checkpoint.step} steps: raise loop.steps to train "
            "further"
        )
    on_message(str(resumption))
    return resumption


def resumable(run: Path, config: RunConfig, on_damage: Callable[[str], None]) -> Resumption:
    """``run`` from its newest whole checkpoint, also when nothing but its last evaluation is left
    to do.

    Raises ConfigError listing what of the recipe changed and must not.
    """
    check_recipe(run, config)
    return Resumption(run, newest_checkpoint(run, on_damage))


def with_begun_warmup(config: RunConfig, resumption: Resumption | None) -> RunConfig:
    """``config`` with the warm-up of the run that is resumed.

    Its share of more steps would be longer: a run that is extended would warm up again."""
    if resumption is None or resumption.checkpoint is None:
        return config
    saved = saved_config(resumption.run)
    learner = LearnerConfig.model_validate(saved.get("learner", {}))
    loop = LoopConfig.model_validate(saved.get("loop", {}))
    begun = {"warmup_steps": learner.rising(loop.steps)}
    return config.model_copy(update={"learner": config.learner.model_copy(update=begun)})


def data_digest(datasets: Datasets, *, named: bool = False) -> str:
    """sha256 over the files whose prompts are asked, names of folders' files included. ``named``:
    with the names of single files too, as checkpoints of earlier releases have it."""
    digest = hashlib.sha256()
    for path in datasets.asked:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = file.name if named or file != path else ""
                digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def check_assets(checkpoint: Checkpoint, model: Path | None, datasets: Datasets) -> None:
    """Raises ConfigError when the model or the data are not those the run began with; None: the
    data alone, before the model is known."""
    asked = ", ".join(map(str, datasets.asked))
    older = data_digest(datasets, named=True)
    for name, before, (now, *others), where in (
        ("model", checkpoint.model, [model_digest(model) if model else checkpoint.model], model),
        ("dataset", checkpoint.data, [data_digest(datasets), older], asked),
    ):
        if before not in (now, *others):
            raise ConfigError(
                f"run {checkpoint.run_id} began with another {name}: {where} has digest "
                f"{now[:12]}, the checkpoint says {before[:12]}; give it the {name} back, or start "
                "a new run"
            )


def open_folder(
    path: Path,
    lock: RunLock,
    resumption: Resumption | None,
    total_steps: int,
    on_warning: Callable[[str], None],
    sinks: Sequence[Sink] = (),
    samples_bytes: int = SAMPLES_BYTES,
) -> RunFolder:
    """The run's folder, locked: new, or put back to the checkpoint. Raises ConfigError when another
    job has it."""
    if resumption is None:
        folder = RunFolder(
            path,
            total_steps=total_steps,
            on_warning=on_warning,
            sinks=sinks,
            samples_bytes=samples_bytes,
        )
        lock.acquire()
        return folder
    lock.acquire()
    sweep_socket(path)
    checkpoint = resumption.checkpoint
    truncate_metrics(path, checkpoint.metrics_bytes if checkpoint else 0)
    return RunFolder(
        path,
        resume_step=resumption.step,
        total_steps=total_steps,
        on_warning=on_warning,
        sinks=sinks,
        samples_bytes=samples_bytes,
    )


def sweep_socket(path: Path) -> None:
    """Remove the folder of the socket that an embedded Redis of a killed job left behind; its lock
    names it."""
    named = path / "redis" / "lock"
    if named.is_file():
        socket = Path(named.read_text().removeprefix("unix://"))
        if socket.name == "redis.sock" and socket.parent.name.startswith("avatar-"):
            shutil.rmtree(socket.parent, ignore_errors=True)


def truncate_metrics(path: Path, length: int) -> None:
    """Metrics past the checkpoint move to metrics.abandoned.jsonl: their steps will be run
    again."""
    file = path / "metrics.jsonl"
    if not file.is_file() or file.stat().st_size <= length:
        return
    with open(file, "r+b") as metrics, open(path / "metrics.abandoned.jsonl", "ab") as abandoned:
        metrics.seek(length)
        rest = metrics.read()
        abandoned.write(rest if rest.endswith(b"\n") else rest + b"\n")
        abandoned.flush()
        os.fsync(abandoned.fileno())
        metrics.truncate(length)
