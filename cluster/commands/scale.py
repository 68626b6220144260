"""`avatar scale`: how many rollout actors a run under way should have, from the outside."""

from __future__ import annotations

from pathlib import Path

import yaml

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import RolloutSection
from avatar_rl.cluster.services.run_buffer import running_server
from avatar_rl.cluster.telemetry.run_files import ENDED, MASK, read_status
from avatar_rl.cluster.workers.rollout_fleet import DESIRED
from avatar_rl.common.errors import ConfigError

RECONNECT_S = 2.0  # the run is there or it is not


def scale(folder: Path, workers: int, *, url: str | None = None) -> str:
    """Sets the desired number of rollout actors of the run in ``folder``; says so in words. The
    run's supervisor sees it within a second or so; actors join and leave while it trains.

    Raises ConfigError when the folder is no run's, the run is over, or its recipe does not allow
    the number, and BufferUnreachableError when its Redis does not answer."""
    recipe = folder / "config.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{folder} is not a run folder: give one of `avatar runs`")
    status = read_status(folder)
    if status.lost or status.state in ENDED:
        state = "lost" if status.lost else status.state
        raise ConfigError(f"run {status.run_id} is {state}: only a run under way can be scaled")
    settings = yaml.safe_load(recipe.read_text())
    if settings.get("resources", {}).get("colocate"):
        raise ConfigError(
            f"run {status.run_id} is colocated: it has a rollout actor for each device, and "
            "cannot be scaled"
        )
    rollout = RolloutSection.recorded(settings["rollout"])
    if rollout.bounded(workers) != workers:
        most = "any number" if rollout.max_workers is None else str(rollout.max_workers)
        raise ConfigError(
            f"run {status.run_id} allows {rollout.min_workers} to {most} rollout workers, not "
            f"{workers}"
        )
    config = BufferConfig.recorded(settings["buffer"] | {"url": None, "reconnect_s": RECONNECT_S})
    where = url or settings["buffer"]["url"] or running_server(folder)
    if where is None:
        raise ConfigError(f"{folder} names no Redis: give the run's with --url")
    if MASK in where:
        raise ConfigError(
            "the run's Redis URL holds a password, which its config.yaml does not keep: give --url"
        )
    with ReplayBuffer.attach(config, status.run_id, where) as buffer:
        before = buffer.control.desired(DESIRED)
        buffer.control.set_desired(DESIRED, workers)
    return (
        f"rollout workers of {status.run_id}: {rollout.workers if before is None else before} "
        f"-> {workers} desired"
    )
