"""The run's Ray actors: placed, made ready under a deadline, and asked together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avatar_rl.actors.rollout import RolloutActor
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.buffer_service.weights.store import WeightStore
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.services.placement import release, reserve, shortage
from avatar_rl.cluster.services.services import Services
from avatar_rl.common.errors import AvatarError, ResourceError
from avatar_rl.learner.actor import LearnerRankActor
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state_replica import StateReplica
from avatar_rl.rewards.actor import RewardActor

#: Ray brings these back by itself and repeats what was asked of them: their calls are safe to
#: repeat.
IMMORTAL: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
#: For train_step, for the weight store's standing call (Outbox), and for questions.
LEARNER_THREADS = 4


class StartDeathError(ResourceError):
    """An actor's process died before it was ready, by no error of its own: another may do
    better."""


class Pool:
    """Creates actors and remembers them. All handles are Ray actor handles."""

    def __init__(self, config: RunConfig, services: Services) -> None:
        self.config, self.services = config, services
        self.weight_store: Any = None
        self.state_replica: Any = None
        self.scorers: list[Any] = []
        self.rollouts: dict[str, Any] = {}
        self.ranks: list[Any] = []
        self._learner_group: Any = None

    def _remote(
        self,
        cls: type,
        *,
        cpus: float,
        gpus: float = 0.0,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> Any:
        import ray

        variables = {"env_vars": environment or self.services.worker_environment()}
        return ray.remote(cls).options(
            num_cpus=cpus, num_gpus=gpus, runtime_env=variables, **options
        )

    def _gpus(self, named: float | None) -> float:
        return named if named is not None else float(self.services.on_gpu)

    def start_weight_store(self) -> None:
        self.weight_store = self._remote(WeightStore, cpus=0, **IMMORTAL).remote()

    def start_state_replica(self, ranks: int) -> None:
        """Holds the learner's state outside the learner; two calls at once: one may write a
        checkpoint."""
        self.state_replica = self._remote(
            StateReplica, cpus=0, max_concurrency=2, **IMMORTAL
        ).remote(ranks)

    def start_scorers(self, datasets: Sequence[Path]) -> None:
        make = self._remote(
            RewardActor,
            cpus=0,
            max_concurrency=64,
            environment=self.services.scorer_environment(),
            **IMMORTAL,
        )
        count = self.config.resources.reward_workers
        self.scorers = [
            make.remote(
                self.services.rewards(),
                tuple(datasets),
                self.config.data.reader,
                self.config.data.media,
            )
            for _ in range(count)
        ]

    def start_rollouts(self, spec: RolloutSpec, names: Sequence[str]) -> list[Any]:
        """New rollout actors; returns the references of their readiness."""
        resources = self.config.resources
        make = self._remote(
            RolloutActor,
            cpus=resources.rollout_cpus,
            gpus=self._gpus(resources.rollout_gpus),
            max_concurrency=4,
            resources=resources.rollout_resources,
            label_selector=resources.rollout_labels or None,
            scheduling_strategy="SPREAD",
        )
        for number, name in enumerate(names):
            scorer = self.scorers[number % len(self.scorers)]
            self.rollouts[name] = make.remote(name, spec, scorer, self.weight_store)
        return [self.rollouts[name].ready.remote() for name in names]

    def start_learner(self, spec: LearnerSpec, *, ranks: int) -> list[Any]:
        """The rank group; returns the references of its readiness. Rank 0 picks the meeting
        point."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources = self.config.resources
        cpus, gpus = resources.learner_cpus, self._gpus(resources.learner_gpus)
        bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self._learner_group = reserve(
            [bundle] * ranks,
            resources.learner_labels,
            strict=resources.learner_strict,
            deadline_s=resources.start_timeout_s,
        )
        places = [
            PlacementGroupSchedulingStrategy(self._learner_group, rank) for rank in range(ranks)
        ]
        self.ranks = [
            self._remote(
                LearnerRankActor,
                cpus=cpus,
                gpus=gpus,
                max_concurrency=LEARNER_THREADS,
                scheduling_strategy=place,
            ).remote(spec, rank, ranks, self.weight_store, self.state_replica)
            for rank, place in enumerate(places)
        ]
        [(address, port)] = self.wait_ready([self.ranks[0].meeting_point.remote()], "learner ranks")
        return [rank.setup.remote(address, port) for rank in self.ranks]

    def stop_learner(self) -> None:
        import ray

        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        if self._learner_group is not None:
            release(self._learner_group)
            self._learner_group = None

    def wait_ready(self, references: Sequence[Any], what: str) -> list[Any]:
        """Results of readiness calls. Raises ResourceError naming what is missing when the deadline
        passes, and StartDeathError when a process dies meanwhile."""
        import ray

        deadline = self.config.resources.start_timeout_s
        try:
            return ray.get(list(references), timeout=deadline)
        except ray.exceptions.GetTimeoutError as error:
            raise ResourceError(
                f"{what} not ready after {deadline:g} s; {shortage()}. "
                "Give the run fewer actors, the cluster more nodes, or raise "
                "resources.start_timeout_s"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from error
        except ray.exceptions.RayActorError as error:
            kind = ResourceError if error.actor_init_failed else StartDeathError
            raise kind(f"{what} died while starting: {error}") from error


def unwrap(error: Any) -> BaseException:
    """The typed error inside a Ray task error, or the Ray error with its remote traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, AvatarError):
        return cause
    if type(cause).__name__ == "OutOfMemoryError" or "torch.OutOfMemoryError" in str(error):
        last = str(error).strip().splitlines()[-1][:300]
        return ResourceError(
            f"out of GPU memory ({last}): for the learner lower learner.micro_batch_tokens (in a "
            "cold start "
            "cold_start.micro_batch_tokens), or set "
            "learner.share_prefix: false and learner.gradient_checkpointing: true; for rollout "
            "actors lower "
            "rollout.engine.gpu_memory_utilization or max_num_seqs. Then go on with --resume"
        )
    return error
