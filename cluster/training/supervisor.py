"""The run's supervisor: looks after everything that is not the training loop, and takes the
checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.checkpoints.checkpoint import Checkpoint, CheckpointWriter
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.services.redis_watch import RedisWatch
from avatar_rl.cluster.services.restart_budget import RestartBudget
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.services.signals import Stopped, StopSignals
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluation_rounds import EvaluationRounds
from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.pool import Pool
from avatar_rl.cluster.workers.rollout_fleet import Fleet
from avatar_rl.cluster.workers.stall_watch import StallWatch, kill_worker
from avatar_rl.common.errors import ReplayBufferError, ResourceError

LOOK_EVERY_S = 2.0
LOOK_S = 0.2


class Supervisor:
    """``look`` is called at least twice a second while the run works; ``close`` ends it, whatever
    it has reached."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        lock: RunLock,
        services: Services,
        buffer: ReplayBuffer,
        screen: Screen,
    ) -> None:
        self.config, self.folder, self.lock, self.buffer, self.screen = (
            config,
            folder,
            lock,
            buffer,
            screen,
        )
        restarts = config.supervision.restarts
        self.signals = StopSignals()
        self.signals.install()
        self.redis_budget = RestartBudget(restarts, "redis-server")
        self.redis = (
            RedisWatch(services.redis, self.redis_budget, self.report)
            if services.redis is not None
            else None
        )
        self.checkpoints = CheckpointWriter(
            folder.path, keep=config.checkpoint.keep, report=self.report
        )
        rewards = config.rewards
        waits = rewards.asks_judge and rewards.judge.kind != "rule"
        self._stalls = StallWatch(
            config.supervision.stall_s, rewards.judge.deadline_s if waits else 0.0
        )
        self._looked = time.monotonic()
        self._told = False
        self._weight_store: tuple[int, Any] | None = (
            None  # version asked for, reference of the answer
        )
        self.pool: Pool
        self.fleet: Fleet
        self.learner: LearnerGroup
        self.rounds: Mapping[str, EvaluationRounds]
        self.digests: tuple[str, str]  # of the model and the data

    def attach(
        self,
        pool: Pool,
        fleet: Fleet,
        learner: LearnerGroup,
        rounds: Mapping[str, EvaluationRounds],
        digests: tuple[str, str],
    ) -> None:
        """From here on there are actors to look after."""
        self.pool, self.fleet, self.learner, self.rounds, self.digests = (
            pool,
            fleet,
            learner,
            rounds,
            digests,
        )

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
        """Raises Stopped (asked to, and ready), ResourceError (lock lost), or what keeps Redis from
        coming back."""
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
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._look_for_stalls()
            self._look_at_weight_store()

    def _may_stop(self) -> bool:
        """In the middle of a step only when the state of its beginning is held, or there is no time
        left."""
        version = self.buffer.replay.version()
        nothing = version == 0 or self.config.checkpoint.every == 0
        return (
            nothing
            or self.signals.waited > self.config.supervision.grace_s / 2
            or self.learner.held(version)
        )

    def between_steps(self, step: int, accuracies: Sequence[float], *, last: bool = False) -> None:
        """``step`` steps are done: checkpoint if one is due, as after the ``last`` one; stop if
        that was asked."""
        for budget in (self.fleet.budget, self.redis_budget):
            budget.progress()
        every = self.config.checkpoint.every
        due = every > 0 and (step % every == 0 or step == self.config.loop.steps or last)
        if due or (self.signals.asked is not None and every > 0):
            self.checkpoint(step, accuracies)
        if self.signals.asked is not None:
            raise Stopped(self.signals.asked)

    def _look_for_stalls(self) -> None:
        import ray

        facts: dict[str, Any] = {}

        def holding(name: str) -> bool:
            facts[name] = self.buffer.control.get_value(f"rollout/{name}") or {}
            return facts[name].get("in_flight", 0) > 0

        stalled = self._stalls.stalled(
            self.fleet.working.values(), self.buffer.control.heartbeats(), holding
        )
        for name, reason in stalled.items():
            self.report("rollout actor stalled", f"{name}: {reason}; it is killed")
            self._stalls.forget(name)
            fact = facts.get(name) or self.buffer.control.get_value(f"rollout/{name}") or {}
            if fact.get("host") == self.lock.host:
                kill_worker(
                    int(fact["pid"]), "ray::RolloutActor"
                )  # one that is stopped does not hear Ray
            ray.kill(self.pool.rollouts[name])

    def _look_at_weight_store(self) -> None:
        """A weight store that died is back by itself, but empty: rollout actors would wait for a
        version it does not have."""
        import ray

        if self._weight_store is None:
            version = self.buffer.replay.version()
            if version > 0:
                self._weight_store = (version, self.pool.weight_store.lost.remote(version))
            return
        version, reference = self._weight_store
        if not ray.wait([reference], timeout=0)[0]:
            return
        self._weight_store = None
        if ray.get(reference) and self.pool.ranks:
            self.report("weight store lost", f"version {version} is published again")
            self.pool.ranks[0].publish_again.remote()

    # -- saving ------------------------------------------------------------------------------------

    def checkpoint_record(self, step: int, version: int, accuracies: Sequence[float]) -> Checkpoint:
        """What is true now."""
        model, data = self.digests
        return Checkpoint(
            run_id=self.lock.run_id,
            step=step,
            version=version,
            model=model,
            data=data,
            metrics_bytes=(self.folder.path / "metrics.jsonl").stat().st_size,
            evaluation={name: rounds.state() for name, rounds in self.rounds.items()},
            accuracies=list(accuracies),
        )

    def checkpoint(self, step: int, accuracies: Sequence[float]) -> None:
        """Between two steps: begin to write a checkpoint; training goes on meanwhile."""
        # What the ranks have captured for the one before is theirs until it is written.
        while not self.checkpoints.wait(LOOK_S):
            if self.signals.waited > self.config.supervision.grace_s:
                return  # save_last says so
        version = self.buffer.replay.version()
        try:
            write_learner = self.learner.writer(version)
        except ResourceError as error:
            self.report(
                "checkpoint failed", f"step {step}: {error}"
            )  # the next step will find the dead rank
            return
        self.checkpoints.begin(
            self.checkpoint_record(step, version, accuracies), write_learner, self.buffer.snapshot
        )

    def save_last(self, accuracies: Sequence[float]) -> None:
        """After Stopped: a checkpoint of the last committed step within what is left of the grace
        time, if its state is held.

        The learner is fenced first, so that no commit can come between its state and the buffer's.
        """
        grace = self.config.supervision.grace_s
        try:
            if not self.checkpoints.wait(max(1.0, grace - self.signals.waited)):
                self.report(
                    "checkpoint left out",
                    f"the one before is still written after grace_s {grace:g}",
                )
                return
            self.buffer.replay.new_fencing_token()
            stats = self.buffer.stats.read()
            done = (
                self.checkpoints.last is not None and self.checkpoints.last.version == stats.version
            )
            if self.config.checkpoint.every == 0 or stats.version == 0 or done:
                return
            if not self.learner.held(stats.version):
                self.report(
                    "checkpoint left out",
                    "no step ended in time and the learner's state is not held outside",
                )
                return
            self.checkpoint(stats.trained_step + 1, accuracies)
            if not self.checkpoints.wait(max(1.0, grace - self.signals.waited)):
                self.report(
                    "checkpoint left out", f"not written within supervision.grace_s {grace:g}"
                )
        except ReplayBufferError as error:
            self.report("checkpoint left out", str(error))

    def close(self) -> None:
        """End what runs beside the training; signals are as before."""
        self.signals.orderly = False
        if self.redis is not None:
            self.redis.stop()
        self.signals.restore()
