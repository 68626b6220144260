"""The run's Ray actors: what each kind is told, where it is placed, and when it is ready."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from avatar_rl.actors.config import default_sequences
from avatar_rl.actors.rollout import RolloutActor
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.buffer_service.control import RunControl
from avatar_rl.buffer_service.weights.store import WeightStore
from avatar_rl.cluster.adapter_road import adapter_road
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets
from avatar_rl.cluster.services.placement import release, reserve, shortage
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.workers.stored_media import store_spec
from avatar_rl.cluster.workers.supervision import StartWatch
from avatar_rl.cluster.workers.weight_road import engine_device, weight_transport
from avatar_rl.common import errors
from avatar_rl.common.errors import AvatarError, ResourceError
from avatar_rl.learner.actor import LearnerRankActor
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state_replica import StateReplica
from avatar_rl.rewards.actor import RewardActor

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from avatar_rl.learner.rank import SetupReport

#: Ray restarts these by itself and repeats what was asked of them; their calls are safe to repeat
#: (supervision.py has the whole table).
IMMORTAL: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
#: For train_step, for the weight store's standing call (Outbox), and for questions.
LEARNER_THREADS = 4
LOOK_S = 1.0  # between looks at what starts
#: Of a GPU, for each of the two actors that take turns on it.
SHARE = 0.5

T = TypeVar("T")


class StartDeathError(ResourceError):
    """An actor's process died before it was ready, by no error of its own: worth another try."""


class ActorClass(Protocol):
    """What Ray makes of a class: ``remote`` starts an actor."""

    def remote(self, *args: Any) -> ActorHandle: ...


class Pool:
    """Creates the run's actors and holds their handles; the last handle to go ends an actor.

    The weight store is there from the beginning; ``state_replica`` stays None where nothing is
    trained.
    """

    def __init__(self, config: RunConfig, services: Services) -> None:
        self.config, self.services = config, services
        self.weight_store = self.actor_class(WeightStore, cpus=0, **IMMORTAL).remote()
        self.state_replica: ActorHandle | None = None
        self.scorers: list[ActorHandle] = []
        self.rollouts: dict[str, ActorHandle] = {}
        self.ranks: list[ActorHandle] = []
        self._learner_group: PlacementGroup | None = None
        self._shared_group: PlacementGroup | None = None  # colocated: a bundle for each device
        self._seats: dict[str, int] = {}  # colocated: rollout actor -> its bundle
        self._control: RunControl | None = None  # of the run that the actors are told
        self._starts: StartWatch | None = None

    def actor_class(
        self,
        cls: type,
        *,
        cpus: float,
        gpus: float = 0.0,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> ActorClass:
        """``cls`` as a Ray actor class with these resources, in a worker's environment."""
        import ray

        variables = {"env_vars": environment or self.services.worker_environment()}
        options |= {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": variables}
        return cast(ActorClass, ray.remote(cls).options(**options))

    def _gpus(self, named: float | None, *, shared: bool = False) -> float:
        """GPUs of an actor; of a colocated one its share."""
        each = SHARE if shared else 1.0
        return named if named is not None else each * self.services.on_gpu

    def start_state_replica(self, ranks: int) -> ActorHandle:
        """Holds the learner's state outside the learner; two calls at once, since one may write a
        checkpoint."""
        make = self.actor_class(StateReplica, cpus=0, max_concurrency=2, **IMMORTAL)
        self.state_replica = make.remote(ranks)
        return self.state_replica

    def start_scorers(self, datasets: Sequence[Path]) -> None:
        make = self.actor_class(
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

    def start_rollouts(self, spec: RolloutSpec, names: Sequence[str]) -> list[ray.ObjectRef[None]]:
        """New rollout actors; returns references that resolve when each is ready. Without scorers
        they answer evaluations only, unscored."""
        resources = self.config.resources
        for number, name in enumerate(names):
            where: dict[str, Any] = {
                "label_selector": resources.rollout_labels or None,
                "scheduling_strategy": "SPREAD",
            }
            if resources.colocate:
                where = {"scheduling_strategy": self._seat(name)}
            make = self.actor_class(
                RolloutActor,
                cpus=resources.rollout_cpus,
                gpus=self._gpus(resources.rollout_gpus, shared=resources.colocate),
                max_concurrency=4,
                resources=resources.rollout_resources,
                environment=self.services.engine_environment(),
                **where,
            )
            scorer = self.scorers[number % len(self.scorers)] if self.scorers else None
            self.rollouts[name] = make.remote(name, spec, scorer, self.weight_store)
        self._watch_starts(spec)
        return [self.rollouts[name].ready.remote() for name in names]

    def start_learner(self, spec: LearnerSpec, *, ranks: int) -> list[ray.ObjectRef[SetupReport]]:
        """The rank group; returns references to what each rank says when ready. Rank 0 picks the
        meeting point."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources = self.config.resources
        shared = spec.turn_lock is not None  # never those of a cold start
        cpus, gpus = resources.learner_cpus, self._gpus(resources.learner_gpus, shared=shared)
        if shared:
            group = self._shared()
        else:
            bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
            group = self._learner_group = reserve(
                [bundle] * ranks,
                resources.learner_labels,
                strict=resources.learner_strict,
                deadline_s=resources.start_timeout_s,
            )
        places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(ranks)]
        if (control := self._watch_starts(spec)) is not None:
            for rank in range(ranks):  # of those before, which would seem frozen
                control.drop_heartbeat("learner", str(rank))
        self.ranks = [
            self.actor_class(
                LearnerRankActor,
                cpus=cpus,
                gpus=gpus,
                max_concurrency=LEARNER_THREADS,
                scheduling_strategy=place,
            ).remote(spec, rank, ranks, self.weight_store, self.state_replica)
            for rank, place in enumerate(places)
        ]
        meeting: ray.ObjectRef[tuple[str, int]] = self.ranks[0].meeting_point.remote()
        [(address, port)] = self.wait_ready([meeting], "learner ranks", self.starting_ranks)
        return [rank.setup.remote(address, port) for rank in self.ranks]

    def _shared(self) -> PlacementGroup:
        """Colocated: one bundle for each device, for a rollout actor and a learner rank. Ray gives
        both the same GPU, since a bundle has one whole."""
        if self._shared_group is None:
            resources = self.config.resources
            cpus = resources.rollout_cpus + resources.learner_cpus
            gpus = sum(
                self._gpus(named, shared=True)
                for named in (resources.rollout_gpus, resources.learner_gpus)
            )
            bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
            devices = max(self.config.rollout.workers, self.config.learner.ranks)
            self._shared_group = reserve(
                [bundle] * devices,
                resources.learner_labels,
                strict=True,
                deadline_s=resources.start_timeout_s,
            )
        return self._shared_group

    def _seat(self, name: str) -> PlacementGroupSchedulingStrategy:
        """The bundle of a new rollout actor: the first that no other one has."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        taken = {seat for other, seat in self._seats.items() if other in self.rollouts}
        self._seats[name] = next(seat for seat in count() if seat not in taken)
        return PlacementGroupSchedulingStrategy(self._shared(), self._seats[name])

    def stop_learner(self) -> None:
        import ray

        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        if self._learner_group is not None:
            release(self._learner_group)
            self._learner_group = None

    def _watch_starts(self, spec: RolloutSpec | LearnerSpec) -> RunControl | None:
        """The run's values, by whose heartbeats the starts are watched; none before there is a
        Redis, in a cold start."""
        if self._control is None and spec.redis_url:
            self._control = RunControl.at(spec.buffer, spec.run_id, spec.redis_url)
            self._starts = StartWatch(
                self._control.watched_heartbeats, self.config.supervision.start_stall_s
            )
        return self._control

    @property
    def starting_ranks(self) -> dict[str, ActorHandle]:
        """Heartbeat -> learner rank, for ``wait_ready``."""
        return {f"learner/{rank}": actor for rank, actor in enumerate(self.ranks)}

    def end_frozen(self, starting: Mapping[str, ActorHandle]) -> None:
        """Kill those of ``starting`` (heartbeat -> actor) that have frozen; cheap."""
        if self._starts is not None:
            self._starts.look(starting)

    def wait_ready(
        self,
        references: Sequence[ray.ObjectRef[T]],
        what: str,
        starting: Mapping[str, ActorHandle] = MappingProxyType({}),
    ) -> list[T]:
        """Results of readiness calls; those of ``starting`` that freeze meanwhile are killed.

        Raises ResourceError naming what is missing when the deadline passes, and StartDeathError
        when a process dies meanwhile."""
        import ray

        allowed = self.config.resources.start_timeout_s
        deadline = time.monotonic() + allowed
        try:
            while True:
                left = max(0.0, deadline - time.monotonic())
                try:
                    return ray.get(list(references), timeout=min(LOOK_S, left))
                except ray.exceptions.GetTimeoutError as error:
                    if left == 0:
                        raise ResourceError(
                            f"{what} not ready after {allowed:g} s; {shortage()}. Give the run "
                            "fewer actors, the cluster more nodes, or raise "
                            "resources.start_timeout_s"
                        ) from error
                self.end_frozen(starting)
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from error
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise start_failure(error, what) from error
            raise StartDeathError(f"{what} died while starting: {error}") from error


def start_failure(error: BaseException, what: str) -> AvatarError:
    """The typed error that an actor's constructor raised, which Ray keeps as text only."""
    raised = list(re.finditer(r"^avatar_rl\.common\.errors\.(\w+): ", str(error), re.MULTILINE))
    if not raised:
        return ResourceError(f"{what} died while starting: {error}")
    kind = getattr(errors, raised[-1][1], AvatarError)
    if kind is errors.InputError:  # takes its sentence in parts
        kind = errors.DataError
    return kind(str(error)[raised[-1].end() :].strip())


def unwrap(error: BaseException) -> BaseException:
    """The typed error inside a Ray task error, or the Ray error with its remote traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, AvatarError):
        return cause
    if type(cause).__name__ == "OutOfMemoryError" or "torch.OutOfMemoryError" in str(error):
        last = str(error).strip().splitlines()[-1][:300]
        return ResourceError(
            f"out of GPU memory ({last}): for the learner lower learner.micro_batch_tokens (in a "
            "cold start cold_start.micro_batch_tokens), or set "
            "learner.gradient_checkpointing: true; for rollout actors lower "
            "rollout.engine.gpu_memory_utilization or max_num_seqs. Then continue with --resume"
        )
    return error


def rollout_spec(
    config: RunConfig,
    run_id: str,
    model: Path,
    datasets: Datasets,
    redis_url: str,
    *,
    on_gpu: bool = False,
    turn_lock: Path | None = None,
) -> RolloutSpec:
    """What every rollout actor of the run is told; ``on_gpu`` as in ``learner_spec``,
    ``turn_lock``: of a colocated run."""
    rollout = config.rollout
    return RolloutSpec(
        run_id=run_id,
        seed=config.seed,
        model=model,
        datasets=datasets.answered,
        data=config.data.reader,
        media=config.data.media,
        template=config.data.template,
        engine=rollout.engine,
        sampling=rollout.sampling,
        evaluation_tokens=config.evaluation.max_tokens,
        buffer=config.buffer,
        redis_url=redis_url,
        max_sequences=rollout.max_sequences or default_sequences(engine_device(config, on_gpu)),
        max_staleness=config.loop.max_staleness,
        lease_s=rollout.lease_s,
        scores_together=config.rewards.quick,
        unimodal=config.rewards.asks_unimodal,
        confidence=config.rewards.asks_confidence,
        dead_by=config.loop.dynamic_sampling.by,
        adapter=adapter_road(config, model)[0],
        turn_lock=turn_lock,
        records_experts=config.learner.router == "replay",
        stored=store_spec(config, model, on_gpu=engine_device(config, on_gpu) == "cuda"),
        transport=weight_transport(config, model, on_gpu=on_gpu)[0],
    )


def learner_spec(
    config: RunConfig,
    run_id: str,
    model: Path,
    datasets: Datasets,
    redis_url: str,
    *,
    cold_start: bool = False,
    on_gpu: bool = False,
    turn_lock: Path | None = None,
    leaves_device: bool = False,
) -> LearnerSpec:
    """What every learner rank is told; ``cold_start``: as ranks of the supervised Stage 0,
    ``on_gpu``: rollout actors have GPUs unless the recipe says otherwise, ``turn_lock`` and
    ``leaves_device``: of a colocated run."""
    assert not cold_start or datasets.sft is not None
    learner = config.learner.model_copy(update={"micro_batch_tokens": config.pack_tokens})
    if cold_start and config.cold_start is not None:
        sft = config.cold_start
        learner = learner.model_copy(
            update={"ranks": sft.ranks, "micro_batch_tokens": sft.micro_batch_tokens}
        )
    return LearnerSpec(
        run_id=run_id,
        seed=config.seed,
        model=model,
        reference=config.model.reference or model,
        datasets=(datasets.sft,) if cold_start and datasets.sft is not None else datasets.asked,
        data=config.data.reader,
        media=config.data.media,
        template=config.data.template,
        learner=learner,
        sft=config.cold_start if cold_start else None,
        buffer=config.buffer,
        redis_url=redis_url,
        steps=config.loop.steps,
        replayed=config.loop.replayed,
        max_tokens=config.rollout.sampling.max_tokens,
        step_timeout_s=config.loop.step_timeout_s,
        attempts=config.loop.dynamic_sampling.attempts,
        engine_dtype=config.rollout.engine.dtype_on(engine_device(config, on_gpu)),
        publishes_adapter=not cold_start and adapter_road(config, model)[0] is not None,
        transport="board" if cold_start else weight_transport(config, model, on_gpu=on_gpu)[0],
        board_every=config.weights.board_every,
        replica_bytes=0 if cold_start else config.checkpoint.replica_bytes,
        turn_lock=turn_lock,
        leaves_device=leaves_device,
    )
