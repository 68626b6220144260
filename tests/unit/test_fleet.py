"""How many rollout actors may be lost before a run gives up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from avatar_rl.cluster.config import RolloutSection
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet
from avatar_rl.common.errors import ResourceError


def a_fleet(workers: int, restarts: int) -> RolloutFleet:
    rollouts: dict[str, Any] = {}

    def start_rollouts(spec: Any, names: list[str]) -> list[str]:
        rollouts.update(dict.fromkeys(names))
        return names

    config = SimpleNamespace(
        supervision=SimpleNamespace(restarts=restarts),
        resources=SimpleNamespace(start_timeout_s=60),
    )
    pool: Any = SimpleNamespace(config=config, rollouts=rollouts, start_rollouts=start_rollouts)
    quiet: Any = SimpleNamespace(event=lambda *said: None)
    buffer: Any = SimpleNamespace(
        requests=SimpleNamespace(abandon=lambda name: None),
        control=SimpleNamespace(drop_heartbeat=lambda *name: None),
    )
    spec: Any = SimpleNamespace(transport="board")
    fleet = RolloutFleet(pool, spec, buffer, quiet, quiet, scaling=RolloutSection(workers=workers))
    fleet.start(workers)
    fleet.working = dict.fromkeys(fleet.members, "")
    return fleet


def test_a_node_that_takes_all_its_actors_along_does_not_end_a_run() -> None:
    fleet = a_fleet(workers=12, restarts=2)
    for name in list(fleet.members):
        fleet._replace(name, "its node is gone")
    assert fleet.size == 12 and fleet.budget.spent == 12


def test_a_fleet_that_cannot_start_gives_up_soon() -> None:
    fleet = a_fleet(workers=12, restarts=2)
    fleet.working.clear()
    with pytest.raises(ResourceError, match="rollout actors died 3 times"):
        for name in list(fleet.members):
            fleet._replace(name, "no memory")


def test_actors_that_die_again_and_again_do() -> None:
    for workers in (1, 3):
        fleet = a_fleet(workers, restarts=2)
        for _ in range(2 + workers - 1):
            fleet._replace(next(iter(fleet.members)), "no memory")
        with pytest.raises(ResourceError, match=f"rollout actors died {2 + workers} times"):
            fleet._replace(next(iter(fleet.members)), "no memory")
