"""What `avatar doctor` and the start of a run say of what a recipe names: files, folders, secrets,
rewards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from avatar_rl.cluster.benchmarks.sets import benchmark_set
from avatar_rl.cluster.commands.findings import Finding, Level, gib
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    check_embeddings,
    check_lora,
    check_model_folder,
    check_sequence_parallel,
    checkpoint_folder,
)
from avatar_rl.cluster.recipe.ready_start import ready_start
from avatar_rl.cluster.recipe.resources import cluster_address
from avatar_rl.cluster.telemetry.run_folder import MIN_FREE_BYTES
from avatar_rl.common.errors import AvatarError, ConfigError
from avatar_rl.rewards.config import BUILTIN
from avatar_rl.rewards.judges.template import JudgeTemplate

ROOMY_BYTES = 10 << 30  # run folders, caches and a checkpoint of a small model
#: Seconds that importing the recipe's own rewards may take.
IMPORT_S = 60.0
_IMPORT = (
    "import json, sys\n"
    "from avatar_rl.common.errors import AvatarError\n"
    "from avatar_rl.rewards.custom import load_reward\n"
    "found = {}\n"
    "for name in sys.argv[1:]:\n"
    "    try:\n"
    "        load_reward(name)\n"
    "    except AvatarError as error:\n"
    "        found[name] = str(error)\n"
    "print('\\n' + json.dumps(found))\n"
)


def model(config: RunConfig) -> Iterator[Finding]:
    """The policy, its reference and a judge that the run serves."""
    remedy = "download it beforehand and set {}: runs are offline"
    folders = {"model.reference": config.model.reference}
    if config.model.path != "tiny":
        folders = {"model": Path(config.model.path), **folders}
    judge = config.rewards.judge
    if config.rewards.asks_judge and judge.kind == "managed":
        folders["rewards.judge.managed.path"] = judge.managed.path
    for subject, path in folders.items():
        if path is None:
            continue
        key = "model.path" if subject == "model" else subject
        try:
            if not path.is_dir():
                raise AvatarError(f"{path} is not a folder")
            if subject == "model":
                path = checkpoint_folder(config) or path
            check_model_folder(path)
            if subject == "model":
                check_lora(config, path)
            json.loads((path / "config.json").read_bytes())
            yield Finding(subject, "ok", str(path))
        except AvatarError as error:
            yield Finding(subject, "fail", str(error), remedy.format(key))
        except (OSError, ValueError) as error:
            yield Finding(
                subject, "fail", f"{path}/config.json cannot be read: {error}", f"correct {key}"
            )


def learner(config: RunConfig) -> Iterator[Finding]:
    """What the learner's keys ask of the model. A folder that cannot be read is the model's own
    finding."""
    for key, check in (
        ("learner.sequence_parallel", check_sequence_parallel),
        ("learner.embeddings.mode", check_embeddings),
    ):
        try:
            check(config)
        except ConfigError as error:
            found, remedy = str(error).rsplit(": ", 1)
            yield Finding(key, "fail", found, remedy)
        except (AvatarError, OSError, ValueError):
            continue


def files(config: RunConfig) -> Iterator[Finding]:
    """Datasets and the other files and folders that the recipe names."""
    data = config.data
    for name in ("train", "heldout", "sft"):
        file: Path | None = getattr(data, name)
        if file is not None:
            there = file.exists()
            remedy = "" if there else f"set data.{name}; `avatar data validate` looks inside"
            yield Finding(
                f"data.{name}",
                "ok" if there else "fail",
                f"{file}{'' if there else ' is missing'}",
                remedy,
            )
    others: list[tuple[str, Path | None]] = [
        ("loop.replay_from", config.loop.replay_from),
        ("buffer.tls_ca", config.buffer.tls_ca if config.buffer.url else None),
        ("data.reader.media_root", data.reader.media_root),
        *(("data.media.roots", root) for root in data.media.roots),
    ]
    for key, path in others:
        if path is not None and not path.exists():
            yield Finding(key, "fail", f"{path} is missing", f"correct {key}")
    yield from _public_sets(config)


def _public_sets(config: RunConfig) -> Iterator[Finding]:
    """The benchmarks that a run is measured on: known, and with a folder of their own."""
    wanted = config.evaluation.benchmarks
    for name in wanted.names:
        try:
            folder = (wanted.sets or Path()) / benchmark_set(name).name
        except ConfigError as error:
            yield Finding("evaluation.benchmarks.names", "fail", *str(error).split(": ", 1))
            continue
        if not folder.is_dir():
            yield Finding(
                "evaluation.benchmarks.sets",
                "fail",
                f"{folder} is missing",
                f"download {name} to it (docs/evaluation.md), or leave the set out",
            )


def secrets(config: RunConfig) -> Iterator[Finding]:
    """The variable with a judge's key; doctor_redis.py looks at the buffer's password."""
    judge = config.rewards.judge
    if not config.rewards.asks_judge or judge.kind != "openai" or judge.api_key_env is None:
        return
    if judge.api_key_env not in os.environ:
        yield Finding(
            "rewards.judge.api_key_env",
            "fail",
            f"the variable {judge.api_key_env} is not set",
            f"export {judge.api_key_env}",
        )


def _judge_prompt(config: RunConfig) -> Iterator[Finding]:
    file = config.rewards.judge.prompt
    if file is None or "judge" not in config.rewards.weights:
        return
    try:
        JudgeTemplate.read(file)
    except AvatarError as error:
        yield Finding("rewards.judge.prompt", "fail", str(error), "correct the file")
    else:
        yield Finding("rewards.judge.prompt", "ok", str(file))


def rewards(config: RunConfig) -> Iterator[Finding]:
    """The recipe's own rewards are imported in a process of their own, as in a worker."""
    yield from _judge_prompt(config)
    named = [name for name in config.rewards.weights if name not in BUILTIN]
    if not named:
        return
    paths = [*sys.path, os.getcwd()]  # Ray adds the current folder
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT, *named],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
        )
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = dict.fromkeys(named, f"not imported within {IMPORT_S:g} s")
    except (ValueError, IndexError):
        last = next(reversed(done.stderr.strip().splitlines()), "it said nothing")
        found = dict.fromkeys(named, f"importing it ended the process ({last})")
    for name in named:
        if name not in found:
            yield Finding("rewards", "ok", name)
            continue
        yield Finding(
            f"rewards.weights.{name}",
            "fail",
            found[name],
            "correct the import path MODULE:FUNCTION, repair the module, or put its folder on "
            "PYTHONPATH",
        )


def folders(config: RunConfig) -> Iterator[Finding]:
    """Where the run writes."""
    for name in ("folder", "cache"):
        path: Path = getattr(config.output, name)
        subject = f"output.{name}"
        nearest = next(
            parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()
        )
        if cluster_address(config) and nearest == Path(path.absolute().anchor):
            remedy = f"is the shared storage mounted on this machine? else set {subject}"
            yield Finding(subject, "fail", f"nothing of {path} is here", remedy)
            continue
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            yield Finding(
                subject, "fail", f"{nearest} cannot be written: {error.strerror}", f"set {subject}"
            )
            continue
        free = shutil.disk_usage(nearest).free
        level: Level = "fail" if free < MIN_FREE_BYTES else "warn" if free < ROOMY_BYTES else "ok"
        remedy = "" if level == "ok" else f"free some space or set {subject}"
        yield Finding(subject, level, f"{path}: writable, {gib(free)} free", remedy)


def cold_start(config: RunConfig) -> Iterator[Finding]:
    """The finished cold start that a recipe brings along is there and whole."""
    try:
        ready_start(config)
    except ConfigError as error:
        found, _, remedy = str(error).removeprefix("cold_start.ready ").partition("; ")
        yield Finding("cold_start.ready", "fail", found, remedy)
