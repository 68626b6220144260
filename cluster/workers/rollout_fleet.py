"""The rollout actors of a run: started, watched, replaced, scaled, stopped.

What a death of one costs is in supervision.py, beside the rest of the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.news import Noticeboard
from avatar_rl.cluster.config import RolloutSection
from avatar_rl.cluster.services.placement import shortage
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.workers.pool import Pool, StartDeathError, unwrap
from avatar_rl.cluster.workers.supervision import RestartBudget

if TYPE_CHECKING:
    import ray

STOP_S = 5.0
LOOK_S = 1.0  # between looks at the desired state
DESIRED = "rollout_workers"  # its name in the buffer; `avatar scale` writes it

#: Of the autoscaler, shares of a step's wall time. Between high and low nothing changes.
LEARNER_WAITS = 0.25
ROLLOUTS_WAIT = 0.5
IDLE = 0.1
PATIENCE = 3  # steps in a row that must say the same
COOLDOWN = 3  # steps after a change whose waits still show the old size


@dataclass
class Autoscaler:
    """How many rollout actors to have: more while the learner waits, fewer while rollouts wait.

    One actor at a time, within [smallest, largest]. Feed it every step.
    """

    smallest: int
    largest: int
    _streak: int = 0  # steps in a row: above 0 that ask for more, below 0 for less
    _rest: int = 0

    def observe(
        self, workers: int, *, learner_wait: float, rollout_wait: float, step: float
    ) -> int:
        """The size to have, from one step's waits and its length, all in seconds."""
        if self._rest > 0:
            self._rest -= 1
            return workers
        learner, rollouts = (
            wait / step if step > 0 else 0.0 for wait in (learner_wait, rollout_wait)
        )
        if learner > LEARNER_WAITS and rollouts < IDLE:
            self._streak = max(self._streak, 0) + 1
        elif rollouts > ROLLOUTS_WAIT and learner < IDLE:
            self._streak = min(self._streak, 0) - 1
        else:
            self._streak = 0
        if abs(self._streak) < PATIENCE:
            return workers
        wanted = min(self.largest, max(self.smallest, workers + (1 if self._streak > 0 else -1)))
        self._streak = 0
        if wanted != workers:
            self._rest = COOLDOWN
        return wanted


@dataclass
class Member:
    """An actor's way through the fleet: it joins (its engine starts), works, and may be asked to
    leave."""

    ready: ray.ObjectRef[None] | None  # resolves when its engine is up; None once it works
    deadline: float  # to be ready, or, once it is leaving, to have drained
    leaving: bool = False
    stopped: bool = False  # leaving, and past its time: told to stop where it is


class RolloutFleet:
    """Keeps as many rollout actors as are desired; one that dies is replaced and its leases are
    given back.

    The desired number lies in the buffer, so it outlives this process and anyone may set it; where
    it is not set, it is ``scaling.workers``. Nobody waits for an actor that joins or leaves:
    training continues.
    """

    def __init__(
        self,
        pool: Pool,
        spec: RolloutSpec,
        buffer: ReplayBuffer,
        folder: RunFolder,
        screen: Screen,
        *,
        scaling: RolloutSection,
    ) -> None:
        self.pool, self.spec, self.buffer, self.folder, self.screen = (
            pool,
            spec,
            buffer,
            folder,
            screen,
        )
        self.scaling = scaling
        self.working: dict[ray.ObjectRef[None], str] = {}  # of its run() -> actor
        self.members: dict[str, Member] = {}
        self.budget = RestartBudget(pool.config.supervision.restarts, "rollout actors")
        self._notices = (
            Noticeboard(spec.buffer, spec.run_id, spec.redis_url)
            if spec.transport != "board"
            else None
        )
        self._named = 0
        self._looked = 0.0
        self._works = False  # actors lease requests as soon as they are up
        self._rests = False  # colocated: the learner has the device
        largest = scaling.max_workers
        self._policy = (
            Autoscaler(scaling.min_workers, largest)
            if scaling.autoscale and largest is not None
            else None
        )

    def start(self, count: int) -> None:
        """Start ``count`` new actors; ``work`` sets them going."""
        names = [f"rollout-{self._named + number}" for number in range(count)]
        self._named += count
        references = self.pool.start_rollouts(self.spec, names)
        deadline = time.monotonic() + self.pool.config.resources.start_timeout_s
        self.members |= {
            name: Member(ready, deadline) for name, ready in zip(names, references, strict=True)
        }

    def await_ready(self) -> None:
        """Wait until every engine is up; an actor that dies before is replaced. Raises what
        ``Pool.wait_ready`` does."""
        ready: set[str] = set()
        while starting := sorted(self.members.keys() - ready):
            name = starting[0]
            try:
                self.pool.wait_ready(
                    [self.pool.rollouts[name].ready.remote()],
                    "rollout actors",
                    {f"rollout/{other}": self.pool.rollouts[other] for other in starting},
                )
                ready.add(name)
            except StartDeathError as death:
                self._replace(name, str(death))

    def work(self) -> None:
        """Every actor leases requests from now on, or as soon as its engine is up."""
        self._works = True
        for name in sorted(self.members.keys() - set(self.working.values())):
            self._go(name)

    def watch(self, timeout: float = 0.1) -> None:
        """Replace the actors that died and reconcile, waiting for a death up to ``timeout``
        seconds."""
        import ray

        if self.working:
            done, _ = ray.wait(list(self.working), num_returns=1, timeout=timeout)
            for reference in done:
                self.replace(reference)
        else:  # the only one is being replaced
            time.sleep(timeout)
        self.reconcile()

    def replace(self, reference: ray.ObjectRef[None]) -> None:
        """An actor's ``run`` ended: it left as it was told, or it died and another is started."""
        import ray

        name = self.working.pop(reference)
        try:
            ray.get(reference)
            reason = ""
        except ray.exceptions.RayError as error:
            reason = str(unwrap(error))
        if self.members[name].leaving:
            how = "stopped after its deadline" if self.members[name].stopped else "drained"
            if reason:
                how = f"died on its way out: {reason}"
            self._forget(name)
            self._say("rollout actor left", f"{name}: {how}")
            return
        self._replace(name, reason or "its run ended")

    def _replace(self, name: str, reason: str) -> None:
        self.folder.event("rollout actor died", f"{name}: {reason}")
        self.screen.event(f"{name} died and is replaced: {reason.splitlines()[-1][:160]}")
        restarts = self.pool.config.supervision.restarts
        if self.working and restarts:
            # A node takes all its actors along, which is one misfortune and not many.
            self.budget.limit = restarts + self.size - 1
        self.budget.spend(f"{name}: {reason}")
        self._forget(name)
        if not self._rests:  # else in the engines' next turn
            self.start(1)

    # -- colocated ---------------------------------------------------------------------------------

    def end_turn(self, look: Callable[[], None]) -> None:
        """Every engine finishes what it has, sleeps and leaves its device to the learner.

        Returns once each has said so, or is dead; the dead are replaced in the next turn.
        """
        self._rests = True
        self._ask_all("end_turn", look)

    def begin_turn(self, look: Callable[[], None]) -> None:
        """The devices are the engines' again. Returns once all are awake; new ones start in place
        of those that died meanwhile."""
        self._rests = False
        self._ask_all("begin_turn", look)
        if self._works:
            self._looked = 0.0
            self.reconcile()
        elif missing := self.scaling.workers - self.size:
            self.start(missing)

    def _ask_all(self, what: str, look: Callable[[], None]) -> None:
        """The answer of every actor, also of one that is starting; one that dies, fails or is
        silent for as long as a start may take is given up."""
        import ray

        deadline = time.monotonic() + self.pool.config.resources.start_timeout_s

        asked: dict[ray.ObjectRef[None], str] = {
            getattr(self.pool.rollouts[name], what).remote(): name for name in self.members
        }
        while asked:
            done, _ = ray.wait([*asked, *self.working], num_returns=1, timeout=LOOK_S / 2)
            for reference in done:
                if reference in self.working:
                    self.replace(reference)
                elif (name := asked.pop(reference)) in self.members:
                    self._hear(name, reference)
            now = time.monotonic()
            if self._works:
                self._welcome(now)
            look()
            for reference, name in list(asked.items()) if now > deadline else ():
                del asked[reference]
                self._give_up(name, f"no answer to {what}")

    def _hear(self, name: str, answer: ray.ObjectRef[None]) -> None:
        import ray

        try:
            ray.get(answer)
        except ray.exceptions.RayError as error:
            self._give_up(name, str(unwrap(error)))

    def _give_up(self, name: str, reason: str) -> None:
        """An actor that failed in its turn may live on, with the device: it is ended."""
        import ray

        if name in self.members:
            ray.kill(self.pool.rollouts[name])
            self.working = {run: other for run, other in self.working.items() if other != name}
            self._replace(name, reason)

    # -- scaling -----------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Actors that work or join."""
        return sum(not member.leaving for member in self.members.values())

    def desired(self) -> int:
        """What the run should have, within the recipe's bounds."""
        wanted = self.buffer.control.desired(DESIRED)
        return self.scaling.bounded(self.scaling.workers if wanted is None else wanted)

    def reconcile(self) -> None:
        """Compare with the desired number, and look at who joins and leaves. Cheap; waits for
        nobody."""
        now = time.monotonic()
        if self._rests or now - self._looked < LOOK_S:
            return
        self._looked = now
        self._welcome(now)
        self._see_off(now)
        missing = self.desired() - self.size
        if missing > 0:
            first = self._named
            self.start(missing)
            self._say(
                "rollout actors join",
                ", ".join(f"rollout-{first + number}" for number in range(missing)),
            )
        elif missing < 0:
            self._dismiss(-missing, now)

    def autoscale(self, metrics: Mapping[str, float]) -> None:
        """Where the recipe asks for it: set the desired number from the waits of one step."""
        if (
            self._policy is None
            or "time/learner_wait" not in metrics
            or "time/rollout_wait" not in metrics
        ):
            return
        now = self.desired()
        wanted = self._policy.observe(
            now,
            learner_wait=metrics["time/learner_wait"],
            rollout_wait=metrics["time/rollout_wait"],
            step=metrics["time/step"],
        )
        if wanted != now:
            self.buffer.control.set_desired(DESIRED, wanted)
            self._say("rollout pool autoscaled", f"{now} -> {wanted} actors desired")

    def _welcome(self, now: float) -> None:
        """Actors whose engine is up begin; those that Ray could not place in time are given up."""
        import ray

        joining = self.members.keys() - set(self.working.values())
        self.pool.end_frozen({f"rollout/{name}": self.pool.rollouts[name] for name in joining})
        for name, member in list(self.members.items()):
            if member.ready is None or name not in joining:
                continue
            done, _ = ray.wait([member.ready], timeout=0)
            if done:
                self._go(name)  # a failed start shows itself there as a death
            elif now > member.deadline:
                self._kill(name)
                self._say("rollout actor not placed", f"{name}: {shortage()}; it is tried again")

    def _dismiss(self, count: int, now: float) -> None:
        """The youngest leave first: at once where they only join, else when their groups are
        delivered."""
        staying = [name for name, member in self.members.items() if not member.leaving]
        for name in staying[-count:]:
            member = self.members[name]
            if name not in self.working.values():
                self._kill(name)
                self._say("rollout actor left", f"{name} before it had started")
                continue
            member.leaving, member.deadline = True, now + self.scaling.drain_s
            self.pool.rollouts[name].drain.remote()
            self._say(
                "rollout actor leaves",
                f"{name} finishes what it holds, at most {self.scaling.drain_s:g} s",
            )

    def _see_off(self, now: float) -> None:
        """Past its deadline a leaving actor is stopped and gives its leases back; one that cannot
        even do that is killed."""
        for name, member in list(self.members.items()):
            if not member.leaving or now <= member.deadline:
                continue
            if not member.stopped:
                member.stopped, member.deadline = True, now + STOP_S
                self.pool.rollouts[name].stop.remote()
            else:
                self._kill(name)
                self._say("rollout actor left", f"{name} was killed")

    def _go(self, name: str) -> None:
        self.members[name].ready = None
        self.working[self.pool.rollouts[name].run.remote()] = name

    def _kill(self, name: str) -> None:
        import ray

        ray.kill(self.pool.rollouts[name])
        self.working = {run: other for run, other in self.working.items() if other != name}
        self._forget(name)

    def _forget(self, name: str) -> None:
        self.members.pop(name)
        self.pool.rollouts.pop(name)  # the last handle: Ray ends the process
        self.buffer.requests.abandon(name)  # what it held goes to another at once
        self.buffer.control.drop_heartbeat("rollout", name)
        if self._notices is not None:
            self._notices.forget(name)  # no transfer waits for it

    def _say(self, kind: str, message: str) -> None:
        self.folder.event(kind, message)
        self.screen.event(f"{kind}: {message}")

    def stop(self) -> None:
        """Ask the actors to stop and wait up to ``STOP_S``, so that they leave no lease behind."""
        import ray

        if not ray.is_initialized():
            return
        for actor in self.pool.rollouts.values():
            actor.stop.remote()
        if self.working:
            ray.wait(list(self.working), num_returns=len(self.working), timeout=STOP_S)

    def close(self) -> None:
        """Stop the actors and end their processes, which frees their resources for others."""
        import ray

        self.stop()
        actors = list(self.pool.rollouts.values())
        self.pool.rollouts.clear()
        for actor in actors:
            ray.kill(actor)
