"""`avatar doctor`: looks at this machine, and at what a recipe needs of it, before anything
expensive starts."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from avatar_rl.cluster.commands import doctor_machine as machine
from avatar_rl.cluster.commands.doctor_redis import redis_findings
from avatar_rl.cluster.commands.findings import Finding, Level, gib
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.telemetry.run_folder import MIN_FREE_BYTES
from avatar_rl.common.errors import AvatarError

ROOMY_BYTES = 10 << 30  # run folders, caches and a checkpoint of a small model


def examine(recipe: Path | None = None, overrides: Sequence[tuple[str, str]] = ()) -> list[Finding]:
    """All findings, in a fixed order; of a curriculum those of its last stage. A check that breaks
    is itself a finding; nothing is raised and nothing is left behind."""
    config: RunConfig | None = None
    findings: list[Finding] = []
    if recipe is not None:
        try:
            config = _resolved(recipe, overrides)
            findings.append(Finding("recipe", "ok", f"{recipe} is valid"))
        except AvatarError as error:
            findings.append(
                Finding(
                    "recipe",
                    "fail",
                    str(error),
                    "correct the recipe; `avatar train --dry-run` shows it",
                )
            )
    checks: list[Callable[[], Iterator[Finding]]] = [
        machine.python,
        machine.packages,
        machine.vllm,
        lambda: machine.gpu(config),
        lambda: machine.memory(config),
        machine.shm,
        machine.limits,
        machine.decoding,
        lambda: _folders(config),
        lambda: _inputs(config),
        lambda: _network(config),
        lambda: redis_findings(config.buffer if config else None),
    ]
    for check in checks:
        try:
            findings += check()
        except (OSError, AvatarError, subprocess.SubprocessError, ValueError) as error:
            name = getattr(check, "__name__", "check").strip("_<>")
            findings.append(
                Finding(name, "fail", f"could not be looked at: {error}", "see the message")
            )
    return findings


def _resolved(recipe: Path, overrides: Sequence[tuple[str, str]]) -> RunConfig:
    from avatar_rl.cluster.curriculum.stages import resolve
    from avatar_rl.cluster.recipe.load import load_recipe, read_recipe

    raw = read_recipe(recipe)
    if "stages" in raw:
        return resolve(raw, overrides, preset_name=None, source=str(recipe)).stages[-1].config
    return load_recipe(recipe, overrides)


def _folders(config: RunConfig | None) -> Iterator[Finding]:
    if config is None:
        return
    for name in ("folder", "cache"):
        path: Path = getattr(config.output, name)
        subject = f"output.{name}"
        nearest = next(
            parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir()
        )
        if config.resources.address and nearest == Path(path.absolute().anchor):
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


def _inputs(config: RunConfig | None) -> Iterator[Finding]:
    if config is None:
        return
    from avatar_rl.cluster.recipe.assets import check_model_folder

    if config.model.path != "tiny":
        path = Path(config.model.path)
        try:
            if not path.is_dir():
                raise AvatarError(f"{path} is not a folder")
            check_model_folder(path)
            yield Finding("model", "ok", str(path))
        except AvatarError as error:
            yield Finding(
                "model",
                "fail",
                str(error),
                "download it beforehand and set model.path: runs are offline",
            )
    for name in ("train", "heldout", "sft"):
        file: Path | None = getattr(config.data, name)
        if file is not None:
            there = file.exists()
            remedy = "" if there else f"set data.{name}; `avatar data validate` looks inside"
            yield Finding(
                f"data.{name}",
                "ok" if there else "fail",
                f"{file}{'' if there else ' is missing'}",
                remedy,
            )


def _network(config: RunConfig | None) -> Iterator[Finding]:
    with socket.socket() as probe:  # the learner's ranks meet on a port of this kind
        probe.bind(("", 0))
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    level: Level = "ok" if high - low >= 10_000 else "warn"
    remedy = "" if level == "ok" else "sysctl net.ipv4.ip_local_port_range='32768 60999'"
    yield Finding("ports", level, f"{low} to {high} for Ray, gloo and NCCL", remedy)
    if config is None:
        return
    if (port := config.output.prometheus_port) is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.output.prometheus_host, port))
                yield Finding("metrics port", "ok", f"{port} is free")
            except OSError as error:
                yield Finding(
                    "metrics port",
                    "fail",
                    f"{port}: {error.strerror}",
                    "set output.prometheus_port",
                )
    address = config.resources.address
    if address and (found := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)):
        try:
            socket.create_connection((found[1], int(found[2])), timeout=5).close()
            yield Finding("Ray cluster", "ok", f"{address} answers")
        except OSError as error:
            yield Finding(
                "Ray cluster",
                "fail",
                f"{address}: {error}",
                "start it, or correct resources.address",
            )
    elif address == "auto":
        there = "RAY_ADDRESS" in os.environ or Path("/tmp/ray/ray_current_cluster").exists()
        found_text = (
            "a cluster runs on this machine" if there else "no cluster runs on this machine"
        )
        remedy = (
            ""
            if there
            else "ray start --address=HEAD:6379 here, or submit the run with `ray job submit`"
        )
        yield Finding("Ray cluster", "ok" if there else "fail", found_text, remedy)
