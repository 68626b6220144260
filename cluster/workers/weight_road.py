"""By which road versions reach the rollouts, resolved for the machine."""

from __future__ import annotations

from pathlib import Path

from avatar_rl.cluster.adapter_road import adapter_road
from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.errors import ConfigError


def engine_device(config: RunConfig, on_gpu: bool) -> str:
    """Where the rollout engines run, as they will find out themselves."""
    device, named = config.rollout.engine.device, config.resources.rollout_gpus
    if device != "auto":
        return device
    return "cuda" if (on_gpu if named is None else named > 0) else "cpu"


def weight_transport(config: RunConfig, model: Path, *, on_gpu: bool) -> tuple[str, str]:
    """ "board", "nccl", "gloo" or "ipc", and why where it is not what the recipe asks for.

    ``on_gpu``: the machine or cluster has GPUs. Raises ConfigError for a transport between GPUs
    where there are none.
    """
    asked = config.weights.transport
    check_transport(config, on_gpu=on_gpu)
    if asked != "board" and adapter_road(config, model)[0] is not None:
        return "board", "rollouts take the adapter itself, a few percent of the bytes"
    if asked != "auto":
        return asked, ""
    if not _both_on_gpu(config, on_gpu):
        return "board", "learner and rollouts have no GPUs"
    return ("ipc" if config.resources.colocate else "nccl"), ""


def check_transport(config: RunConfig, *, on_gpu: bool) -> None:
    """Raises ConfigError for a transport between GPUs where there are none."""
    asked = config.weights.transport
    if asked in ("nccl", "ipc") and not _both_on_gpu(config, on_gpu):
        raise ConfigError(
            f"weights.transport {asked} goes from GPU to GPU, and there is none here: set it to "
            "gloo, which is the same protocol on CPUs, or to board"
        )


def _both_on_gpu(config: RunConfig, on_gpu: bool) -> bool:
    named = config.resources.learner_gpus
    learner = on_gpu if named is None else named > 0
    return learner and engine_device(config, on_gpu) == "cuda"
