"""What `avatar doctor` and the start of a run say of sockets, proxies and the Ray cluster."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import psutil

from avatar_rl.cluster.commands.doctor_plan import gpus_asked
from avatar_rl.cluster.commands.findings import Finding, Level
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.memory import MemoryPlan
from avatar_rl.cluster.recipe.resources import asked_by, cluster_address
from avatar_rl.cluster.services.private_node import has_home
from avatar_rl.common.errors import AvatarError

CONNECT_S = 3.0
NODES_S = 30.0  # importing Ray and one question, on a busy machine
SOCKET_BYTES = 107  # longest name of a unix socket
#: What Ray puts below its folder for temporary files.
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1"
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\[\]:/\s]+):(\d+)")
_NODES = (
    "import json, sys, ray\n"
    "from ray._private.authentication.authentication_token_setup import (\n"
    "    maybe_enable_token_auth_if_token_available as login)\n"
    "login(False)\n"
    "from ray._raylet import GcsClient\n"
    "rows = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5).values()\n"
    "alive = [row for row in rows if row.state == 0]\n"
    "print('\\n' + json.dumps([{'resources': dict(row.resources_total),\n"
    "    'labels': dict(row.labels)} for row in alive]))\n"
)


class ClusterNode(TypedDict):
    """A node that is alive."""

    resources: dict[str, float]
    labels: dict[str, str]


def sockets() -> Iterator[Finding]:
    """Ray's sockets lie below RAY_TMPDIR, else TMPDIR."""
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    folder = os.environ.get(name) or tempfile.gettempdir()
    length, most = len(os.fsencode(folder)), SOCKET_BYTES - len(_RAY_SOCKET)
    if length > most:
        yield Finding(
            name,
            "fail",
            f"{folder} is {length} bytes long: names of Ray's sockets below it would exceed "
            f"{SOCKET_BYTES} bytes",
            f"export RAY_TMPDIR=/tmp, or another folder of at most {most} bytes",
        )
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(name, "fail", f"{folder} cannot be written", f"set {name}")
    else:
        yield Finding(name, "ok", folder)


def home() -> Iterator[Finding]:
    if has_home():
        yield Finding("HOME", "ok", str(Path.home()))
    else:
        yield Finding(
            "HOME",
            "warn",
            f"{os.environ.get('HOME') or 'no folder'} of user {os.getuid()} cannot be written",
            "nothing to do: a local run takes a folder of its own for tokens and caches",
        )


def proxies(config: RunConfig | None) -> Iterator[Finding]:
    """Loopback is always asked directly; a judge elsewhere goes through the proxy."""
    named = [
        name
        for name in ("http_proxy", "https_proxy", "all_proxy")
        if os.environ.get(name) or os.environ.get(name.upper())
    ]
    if not named:
        return
    judge = config.rewards.judge.base_url if config and config.rewards.asks_judge else ""
    asked = f"; {judge} is asked through it unless no_proxy names its host" if judge else ""
    yield Finding("proxy", "ok", f"{', '.join(named)} is set: loopback is asked directly{asked}")


def ports(config: RunConfig | None) -> Iterator[Finding]:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    level: Level = "ok" if high - low >= 10_000 else "warn"
    remedy = "" if level == "ok" else "sysctl net.ipv4.ip_local_port_range='32768 60999'"
    yield Finding("ports", level, f"{low} to {high} for Ray, gloo and NCCL", remedy)
    if config is None or (port := config.output.prometheus_port) is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.output.prometheus_host, port))
            yield Finding("metrics port", "ok", f"{port} is free")
        except OSError as error:
            yield Finding(
                "metrics port",
                "fail",
                f"{config.output.prometheus_host}:{port}: {error.strerror}",
                "set output.prometheus_port and prometheus_host",
            )


def cluster(config: RunConfig | None) -> Iterator[Finding]:
    """The Ray cluster answers, and its nodes hold the run."""
    address = cluster_address(config) if config is not None else None
    if config is None or address is None:
        return
    key = "resources.address" if config.resources.address else "RAY_ADDRESS"
    try:
        where = _located(address, key)
        nodes = _nodes(where)
    except AvatarError as error:
        yield Finding("Ray cluster", "fail", str(error), f"start it, or correct {key}")
        plan = MemoryPlan.of(config)
        if plan is not None:
            needed = gpus_asked(plan, asked_by(config).on_gpu())
            yield Finding(
                "GPU",
                "fail",
                f"none known, since no cluster answers; the recipe needs {needed}",
                f"start it, or correct {key}",
            )
        return
    yield Finding("Ray cluster", "ok", f"{where} answers, {len(nodes)} node(s)")
    yield from _room(config, nodes)


def _located(address: str, key: str) -> str:
    """host:port of the cluster, once something listens there. Raises AvatarError."""
    if address == "auto":
        address = _running_here()
    if address.startswith("ray://"):
        raise AvatarError(
            f"{key} {address} is for Ray Client, which cannot drive a run: submit it with `ray job "
            "submit`, or give the head's host:6379"
        )
    if "://" in address:
        raise AvatarError(
            f"{key} {address} is the dashboard, where `ray job submit` goes: give the head's "
            "host:6379"
        )
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise AvatarError(f"{key} {address!r} is no address: give 'auto' or the head's host:6379")
    try:
        host, port = found[1].strip("[]"), int(found[2])
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise AvatarError(f"{address}: nothing answers there ({error})") from error
    return address


def _running_here() -> str:
    """Address of the cluster that this machine is part of. Raises AvatarError."""
    if os.environ.get("RAY_ADDRESS", "auto") != "auto":
        return os.environ["RAY_ADDRESS"]
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    note = Path(temporary) / "ray" / "ray_current_cluster"
    if note.is_file():
        return note.read_text().strip()
    for process in psutil.process_iter(["cmdline"]):
        for word in process.info["cmdline"] or ():
            if word.startswith("--gcs-address="):
                return str(word.partition("=")[2])
    raise AvatarError(
        "no cluster runs on this machine: `ray start --address=HEAD:6379` here, or submit the run "
        "with `ray job submit`"
    )


def _nodes(address: str) -> list[ClusterNode]:
    """Asked in a process of its own: a failed question leaves Ray unusable where it was asked.

    Raises AvatarError when no Ray answers."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _NODES, address],
            capture_output=True,
            text=True,
            timeout=NODES_S,
        )
        nodes: list[ClusterNode] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise AvatarError(
            f"{address}: something listens there, but no Ray answered within {NODES_S:g} s"
        ) from error
    except (ValueError, IndexError) as error:
        last = next(reversed(done.stderr.strip().splitlines()), "it said nothing")
        raise AvatarError(f"{address}: no Ray answers there ({last})") from error
    return nodes


def _room(config: RunConfig, nodes: list[ClusterNode]) -> Iterator[Finding]:
    """CPUs, GPUs and labels of the nodes against the recipe."""

    def total(name: str) -> float:
        return sum(node["resources"].get(name, 0.0) for node in nodes)

    resources, plan = config.resources, MemoryPlan.of(config)
    needs = asked_by(config)
    needs = needs.on_gpu() if total("GPU") else needs
    short = [
        f"{wanted:g} {name} asked, {total(name):g} there"
        for name, wanted in (("CPU", needs.cpus), ("GPU", needs.gpus))
        if wanted > total(name)
    ]
    labels = resources.learner_labels  # rollout nodes may come later, from an autoscaler
    if labels and not any(labels.items() <= node["labels"].items() for node in nodes):
        named = ", ".join(f"{name}={value}" for name, value in labels.items())
        short.append(f"no node carries the label {named} (resources.learner_labels)")
    if plan is not None and needs.gpus and total("GPU") < needs.gpus:
        yield Finding(
            "GPU",
            "fail",
            f"{total('GPU'):g} in the cluster, and the recipe needs {gpus_asked(plan, needs)}",
            "add nodes with GPUs",
        )
    if short:
        yield Finding(
            "cluster resources",
            "fail",
            f"the cluster has {len(nodes)} node(s): {'; '.join(short)}",
            "add nodes, or lower rollout.workers, learner.ranks or resources.*",
        )
        return
    yield Finding(
        "cluster resources",
        "ok",
        f"{total('CPU'):g} CPUs and {total('GPU'):g} GPUs for {needs.cpus:g} and {needs.gpus:g}",
    )
