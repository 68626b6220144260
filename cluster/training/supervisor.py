"""Looks after everything that is not the training loop, and takes the checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.checkpoints.checkpoint import Checkpoint, CheckpointWriter
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.services.signals import Stopped, StopSignals
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluation import EvaluationRounds
from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet
from avatar_rl.cluster.workers.supervision import RedisWatch, StallWatch, kill_worker
from avatar_rl.common.errors import ReplayBufferError, ResourceError

if TYPE_CHECKING:
    import ray

LOOK_EVERY_S = 2.0
LOOK_S = 0.2


class RolloutValue(TypedDict, total=False):
    """What a rollout actor says of itself in the buffer, among other things."""

    in_flight: int
    host: str
    pid: int


class Fallback(TypedDict):
    """What the learner says of a version that took the board."""

    version: int
    why: str


@dataclass(frozen=True)
class Origin:
    """Digests of what a run began with; a resumed run must begin with the same."""

    model: str
    data: str


class Supervisor:
    """``look`` is called at least twice a second while the run works, ``checkpoint`` between steps.

    What it notices and what follows is in the table of workers/supervision.py.

    Args:
        config: Of the run.
        folder: For events and checkpoints.
        screen: For events.
        lock: Tells when another job takes the run over.
        signals: Tell when the run is to stop.
        redis: Watches the embedded server; None where Redis is somebody else's.
        buffer: Heartbeats, version and snapshot.
        fleet: Rollout actors, looked at for hangs.
        learner: Ranks, whose state a checkpoint holds.
        rounds: Evaluation rounds by name, whose state a checkpoint holds.
        accuracies: Of the last steps, kept up to date by the owner.
        origin: Goes into every checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        folder: RunFolder,
        screen: Screen,
        lock: RunLock,
        signals: StopSignals,
        redis: RedisWatch | None,
        buffer: ReplayBuffer,
        fleet: RolloutFleet,
        learner: LearnerGroup,
        rounds: Mapping[str, EvaluationRounds],
        accuracies: Sequence[float],
        origin: Origin,
    ) -> None:
        self.config, self.folder, self.screen = config, folder, screen
        self.lock, self.signals, self.redis = lock, signals, redis
        self.buffer, self.fleet, self.learner = buffer, fleet, learner
        self.rounds, self.accuracies, self.origin = rounds, accuracies, origin
        self.checkpoints = CheckpointWriter(
            folder.path, keep=config.checkpoint.keep, report=self.report
        )
        rewards = config.rewards
        waits = rewards.asks_judge and rewards.judge.kind != "rule"
        self._stalls = StallWatch(
            config.supervision.stall_s, rewards.judge.deadline_s if waits else 0.0
        )
        self._looked_at = time.monotonic()
        self._told = False
        self._fallback = 0  # version of the last one that was told
        self._settled: int | None = None  # version whose step is logged
        #: Version that the weight store was asked for, and the answer to come.
        self._asked_store: tuple[int, ray.ObjectRef[bool]] | None = None

    def report(self, kind: str, message: str) -> None:
        """Into the run's events and on the screen."""
        self.folder.event(kind, message)
        self.screen.event(f"{kind}: {message}")

    # -- looking -----------------------------------------------------------------------------------

    def watch(self) -> None:
        """Wait a moment for the death of a rollout actor, then look at the rest."""
        self.fleet.watch()
        self.look()

    def look(self) -> None:
        """Look at everything else that can fail; cheap.

        Raises:
            Stopped: the run was asked to stop, and may.
            ResourceError: another job took the run over.
            AvatarError: what keeps Redis from coming back.
        """
        if self.lock.lost is not None:
            raise ResourceError(
                f"run {self.lock.run_id} was taken over by {self.lock.lost}: this job stops"
            )
        if self.redis is not None and self.redis.failure is not None:
            raise self.redis.failure
        if self.signals.asked is not None:
            if not self._told:
                self._told = True
                self.report("stopping", "a checkpoint is saved first; another signal stops at once")
            if self._may_stop():
                raise Stopped(self.signals.asked)
        if time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._look_for_stalls()
            self._look_at_weight_store()
            self._look_at_fallbacks()

    def _may_stop(self) -> bool:
        """Within a step only when the state of its beginning is held, or there is no time left."""
        version = self.buffer.replay.version()
        nothing = version == 0 or self.config.checkpoint.every == 0
        # Committed, and its report is on the way: stopping now would leave its metrics out.
        unreported = self._settled is not None and version != self._settled
        return (
            nothing
            or self.signals.waited > self.config.supervision.grace_s / 2
            or (not unreported and self.learner.held(version))
        )

    def _look_for_stalls(self) -> None:
        import ray

        values: dict[str, RolloutValue] = {}

        def value(name: str) -> RolloutValue:
            found: RolloutValue | None = self.buffer.control.get_value(f"rollout/{name}")
            return found or {}

        def holding(name: str) -> bool:
            values[name] = value(name)
            return values[name].get("in_flight", 0) > 0

        stalled = self._stalls.stalled(
            self.fleet.working.values(), self.buffer.control.watched_heartbeats(), holding
        )
        for name, reason in stalled.items():
            self.report("rollout actor stalled", f"{name}: {reason}; it is killed")
            self._stalls.forget(name)
            found = values.get(name) or value(name)
            if found.get("host") == self.lock.host:
                # A stopped process does not hear Ray.
                kill_worker(int(found["pid"]), "ray::RolloutActor")
            ray.kill(self.fleet.pool.rollouts[name])

    def _look_at_weight_store(self) -> None:
        """A weight store that died is restarted by Ray, but empty: rollout actors would wait for a
        version that it does not have."""
        import ray

        pool = self.fleet.pool
        if self._asked_store is None:
            version = self.buffer.replay.version()
            if version > 0:
                self._asked_store = (version, pool.weight_store.lost.remote(version))
            return
        version, reference = self._asked_store
        if not ray.wait([reference], timeout=0)[0]:
            return
        self._asked_store = None
        if ray.get(reference) and pool.ranks:
            self.report("weight store lost", f"version {version} is published again")
            pool.ranks[0].publish_again.remote()

    def _look_at_fallbacks(self) -> None:
        """A version that took the board, since no group of learner and rollouts could be formed."""
        if self.config.weights.transport == "board":
            return
        found: Fallback | None = self.buffer.control.get_value("weights/fallback")
        if found and found["version"] > self._fallback:
            self._fallback = found["version"]
            self.report(
                "weights fell back", f"version {found['version']} took the board: {found['why']}"
            )

    # -- saving ------------------------------------------------------------------------------------

    def checkpoint(self, step: int, *, last: bool = False) -> None:
        """``step`` steps are done: begin a checkpoint if one is due, as after the ``last`` step.

        Raises Stopped when the run was asked to stop.
        """
        self._settled = self.buffer.replay.version()
        self.fleet.budget.progress()
        if self.redis is not None:
            self.redis.budget.progress()
        every = self.config.checkpoint.every
        due = every > 0 and (step % every == 0 or step == self.config.loop.steps or last)
        if due or (self.signals.asked is not None and every > 0):
            self.begin_checkpoint(step)
        if self.signals.asked is not None:
            raise Stopped(self.signals.asked)

    def begin_checkpoint(self, step: int) -> None:
        """Between two steps: begin to write a checkpoint; training continues meanwhile."""
        # What the ranks captured for the previous one is theirs until it is written.
        while not self.checkpoints.wait(LOOK_S):
            if self.signals.waited > self.config.supervision.grace_s:
                return  # save_last says so
        version = self.buffer.replay.version()
        try:
            write_learner = self.learner.writer(version)
        except ResourceError as error:  # the next step will find the dead rank
            self.report("checkpoint failed", f"step {step}: {error}")
            return
        checkpoint = Checkpoint(
            run_id=self.lock.run_id,
            step=step,
            version=version,
            model=self.origin.model,
            data=self.origin.data,
            metrics_bytes=(self.folder.path / "metrics.jsonl").stat().st_size,
            evaluation={name: rounds.state() for name, rounds in self.rounds.items()},
            accuracies=list(self.accuracies),
        )
        self.checkpoints.begin(checkpoint, write_learner, self.buffer.snapshot)

    def save_last(self) -> None:
        """After Stopped: a checkpoint of the last committed step within what is left of the grace
        time, if its state is held.

        The learner is fenced first, so that no commit can come between its state and the buffer's.
        """
        grace = self.config.supervision.grace_s
        try:
            if not self.checkpoints.wait(max(1.0, grace - self.signals.waited)):
                self._left_out(f"the one before is still written after grace_s {grace:g}")
                return
            self.buffer.replay.new_fencing_token()
            stats = self.buffer.stats.read()
            last = self.checkpoints.last
            done = last is not None and last.version == stats.version
            if self.config.checkpoint.every == 0 or stats.version == 0 or done:
                return
            if not self.learner.held(stats.version):
                self._left_out("no step ended in time and the learner's state is not held outside")
                return
            self.begin_checkpoint(stats.trained_step + 1)
            if not self.checkpoints.wait(max(1.0, grace - self.signals.waited)):
                self._left_out(f"not written within supervision.grace_s {grace:g}")
        except ReplayBufferError as error:
            self._left_out(str(error))

    def _left_out(self, why: str) -> None:
        self.report("checkpoint left out", why)
