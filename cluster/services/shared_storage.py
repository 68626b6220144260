"""A cluster run's files must be seen by every node: proven at the start, by a file that each node
reads."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.resources import cluster_address
from avatar_rl.cluster.services.placement import live_nodes
from avatar_rl.common.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    import ray

JOB_FOLDER = "runtime_resources"  # part of the path where Ray unpacks a job's working directory
PROBE = ".avatar-probe-"


def check_durable(config: RunConfig) -> None:
    """Raises ConfigError when outputs would lie in a job's copy of the working directory, which Ray
    deletes."""
    for name in ("folder", "cache"):
        path: Path = getattr(config.output, name)
        if JOB_FOLDER in path.absolute().parts:
            raise ConfigError(
                f"output.{name}: {path} lies in the job's own copy of the working directory, which "
                "Ray deletes after the job and other nodes do not see: give an absolute path on "
                "storage that all nodes mount"
            )


def placed(config: RunConfig) -> RunConfig:
    """The recipe as its actors need it: in a cluster with absolute paths, on storage that outlives
    the job.

    Raises ConfigError as ``check_durable`` does.
    """
    if cluster_address(config) is None:
        return config
    check_durable(config)
    return anchored(config)


def anchored(config: RunConfig) -> RunConfig:
    """The same recipe with absolute paths, since workers on other nodes start elsewhere."""
    data = {name: getattr(config.data, name) for name in ("train", "heldout", "sft")}
    data = {name: path.absolute() for name, path in data.items() if path is not None}
    output = {name: getattr(config.output, name).absolute() for name in ("folder", "cache")}
    update = {
        "data": config.data.model_copy(update=data),
        "output": config.output.model_copy(update=output),
    }
    return config.model_copy(update=update)


def check_shared(folders: Sequence[Path], readable: Sequence[Path], *, deadline_s: float) -> int:
    """Every live node reads a file that this process writes into each of ``folders``, and finds
    each of ``readable``.

    Returns how many nodes were asked. Raises ResourceError naming node and path, or the node that
    does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token, name = secrets.token_hex(16), f"{PROBE}{secrets.token_hex(4)}"
    probes = [folder.absolute() / name for folder in folders]
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    nodes = live_nodes()
    try:
        for probe in probes:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_text(token)
        asked: dict[ray.ObjectRef[list[Path]], str] = {
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(probes, token, [path.absolute() for path in readable]): node[
                "NodeManagerAddress"
            ]
            for node in nodes
        }
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=deadline_s)
        if late:
            silent = ", ".join(sorted(asked[reference] for reference in late))
            raise ResourceError(
                f"node {silent} did not answer within {deadline_s:g} s: is its link up and Ray "
                "healthy?"
            )
        for reference in done:
            if unseen := ray.get(reference):
                paths = ", ".join(
                    str(path.parent) if path.name == name else str(path) for path in unseen
                )
                raise ResourceError(
                    f"node {asked[reference]} does not see {paths} as this one does: put it on "
                    "storage that all nodes mount at the same path, and set output.folder, "
                    "output.cache, model.path and data.* to it"
                )
    finally:
        for probe in probes:
            probe.unlink(missing_ok=True)
    return len(nodes)


def _look(probes: Sequence[Path], token: str, readable: Sequence[Path]) -> list[Path]:
    """Runs on a node: the paths it does not see."""
    unseen = [path for path in probes if not path.is_file() or path.read_text() != token]
    return unseen + [path for path in readable if not path.exists()]
