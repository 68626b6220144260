"""What a recipe asks of the machine or cluster; shown by --dry-run and checked before any actor
starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.errors import ResourceError

#: A local run may oversubscribe its cores (processes mostly take turns), but not beyond reason.
OVERSUBSCRIPTION = 4


@dataclass(frozen=True)
class Needs:
    """Processes and their resources."""

    rollouts: int
    learners: int
    scorers: int
    rollout_cpus: float
    learner_cpus: float
    rollout_gpus: float
    learner_gpus: float
    forced_gpus: bool  # the recipe names GPU counts: they are needed wherever it runs
    colocated: bool = False  # a rollout actor and a learner rank share a GPU

    @property
    def cpus(self) -> float:
        return self.rollouts * self.rollout_cpus + self.learners * self.learner_cpus

    @property
    def cpus_rounded(self) -> int:
        return math.ceil(self.cpus)

    @property
    def gpus(self) -> float:
        if self.colocated:
            return max(self.rollouts, self.learners) * (self.rollout_gpus + self.learner_gpus)
        return self.rollouts * self.rollout_gpus + self.learners * self.learner_gpus

    def on_gpu(self) -> Needs:
        """The same on a machine with GPUs, where unnamed counts mean one each."""
        if self.forced_gpus:
            return self
        share = 0.5 if self.colocated else 1.0
        return replace(self, rollout_gpus=share, learner_gpus=share)

    def rows(self) -> list[tuple[str, str]]:
        """For the dry run's table."""

        def gpu(count: float) -> str:
            if self.forced_gpus:
                return f"{count:g}"
            return "half a" if self.colocated else "1 where GPUs exist"

        return [
            (
                f"{self.rollouts} x rollout actor (vLLM)",
                f"{self.rollout_cpus:g} CPU, {gpu(self.rollout_gpus)} GPU each",
            ),
            (
                f"{self.learners} x learner rank (DeepSpeed)",
                f"{self.learner_cpus:g} CPU, {gpu(self.learner_gpus)} GPU each",
            ),
            *([("colocated", "an actor and a rank take turns on a GPU")] if self.colocated else []),
            (f"{self.scorers} x reward actor", "shares the CPUs"),
            ("1 x replay buffer (Redis)", "shares the CPUs"),
        ]


def cluster_address(config: RunConfig) -> str | None:
    """The Ray cluster that a run of ``config`` joins: resources.address, else RAY_ADDRESS. None
    where it starts Ray on this machine."""
    address = config.resources.address or os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def needs_of(config: RunConfig) -> Needs:
    """Raises ResourceError when a local run asks for far more processes than this machine has
    cores."""
    needs = asked_by(config)
    cores = os.cpu_count() or 1
    if cluster_address(config) is None and needs.cpus > OVERSUBSCRIPTION * cores:
        raise ResourceError(
            f"this run asks for {needs.cpus:g} CPUs and the machine has {cores}: lower "
            "rollout.workers "
            f"({needs.rollouts}) or learner.ranks ({needs.learners}), or join a cluster with "
            "resources.address"
        )
    return needs


def asked_by(config: RunConfig) -> Needs:
    """What the recipe says, wherever it runs."""
    resources = config.resources
    named = resources.rollout_gpus is not None or resources.learner_gpus is not None
    return Needs(
        rollouts=config.rollout.workers,
        learners=config.learner.ranks,
        scorers=resources.reward_workers,
        rollout_cpus=resources.rollout_cpus,
        learner_cpus=resources.learner_cpus,
        rollout_gpus=resources.rollout_gpus or 0.0,
        learner_gpus=resources.learner_gpus or 0.0,
        forced_gpus=named,
        colocated=resources.colocate,
    )
