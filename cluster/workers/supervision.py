"""What a death costs: who watches whom, how a death is noticed, and what happens then.

=================  =====================================  ==================  ====================
process            noticed by                             budget              what happens
=================  =====================================  ==================  ====================
rollout actor      the end of its ``run`` call;           rollout actors      replaced at once; its
                   ``StallWatch`` kills one that hangs                        leases are given back
learner rank       its step's references;                 learner ranks       all ranks replaced,
                   ``LearnerWatch`` kills a hung group                        from the replica
the same, state    ``StateLostError``                     learner states      the run resumes from
held by nobody                                                                its last checkpoint
cold-start rank    its step's references                  cold-start ranks    all ranks replaced,
                                                                              from the cold start's
                                                                              last checkpoint
embedded Redis     ``RedisWatch``, its process            redis-server        started again from its
                                                                              append-only file
weight store       Ray; the supervisor finds it empty     none                restarted by Ray; rank
                                                                              0 publishes again
state replica      Ray                                    none                restarted by Ray; the
                                                                              next step fills it
reward actor       Ray                                    none                restarted by Ray; its
                                                                              calls are repeated
another job takes  ``RunLock.lost``                       none                this job stops
the run
driver             ``OrphanReaper``, outside it           none                its processes are
                                                                              ended; ``--resume``
=================  =====================================  ==================  ====================

A ``RestartBudget`` allows ``supervision.restarts`` deaths of one kind between two finished steps
(learner states: between two checkpoints). The fleet's allows one more for each actor beyond the
first: a node takes all its actors along. An error that a process raises itself ends the run at
once; no budget is asked.

Two rooms act on this table. Here: ``rollout_fleet`` replaces rollout actors, ``learner_group``
replaces ranks, ``pool`` tells Ray whom to restart. In ``training``: ``supervisor`` looks for
hangs, ``coldstart`` and ``restarts`` start over from a checkpoint.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict

import psutil

from avatar_rl.buffer_service.control import Heartbeat
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.common.errors import AvatarError, ResourceError

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from avatar_rl.learner.rank import Progress

log = logging.getLogger(__name__)

Report = Callable[[str, str], None]  # kind, message


class RestartBudget:
    """Deaths of one kind of process that are allowed between two signs of progress."""

    def __init__(self, limit: int, what: str) -> None:
        self.limit, self.what = limit, what
        self.spent = self.total = 0

    def spend(self, reason: str) -> None:
        """Count one death. Raises ResourceError when there were too many."""
        self.spent += 1
        self.total += 1
        if self.spent > self.limit:
            raise ResourceError(
                f"{self.what} died {self.spent} times without a finished step, last: {reason}; see "
                "the logs folder of the run, or raise supervision.restarts"
            )

    def progress(self) -> None:
        """The system works: earlier deaths no longer count."""
        self.spent = 0


class RedisWatch:
    """Restarts an embedded Redis that died; clients reconnect within ``buffer.reconnect_s``.

    A context manager: its thread watches until the block ends. ``failure`` says why the server
    could not be restarted, for the driver to raise.
    """

    LOOK_S = 0.1

    def __init__(self, server: EmbeddedRedis, budget: RestartBudget, report: Report) -> None:
        self.server, self.budget, self._report = server, budget, report
        self.failure: AvatarError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="redis-watch", daemon=True)

    def __enter__(self) -> RedisWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.LOOK_S):
            if self.server.pid is not None:
                continue
            started = time.monotonic()
            try:
                self.budget.spend("redis-server")
                self.server.start()
            except AvatarError as error:
                self.failure = error
                return
            seconds = time.monotonic() - started
            self._report(
                "redis restarted",
                f"it died and is back from its append-only file ({seconds:.2f} s)",
            )


class Sighting(TypedDict):
    """What a rollout actor's heartbeat last said, and when it last changed (our clock, seconds)."""

    progress: int
    age_s: float
    moved_at: float
    beat_at: float


class StallWatch:
    """Finds rollout actors that hang: no heartbeat, or no progress while they hold prompts.

    Changes are timed by our own clock, so neither hosts' clocks nor a pause of Redis matter. Time
    in which nobody looked (a learner was restarted, a checkpoint waited for) counts as ``GAP_S`` at
    most, since nobody saw what happened in it.

    Args:
        stall_s: Seconds without a change after which an actor counts as hung.
        patience_s: Seconds more for actors that hold prompts; a judge may keep them waiting.
    """

    GAP_S = 10.0

    def __init__(self, stall_s: float, patience_s: float = 0.0) -> None:
        self.stall_s, self.patience_s = stall_s, patience_s
        self._seen: dict[str, Sighting] = {}
        self._looked_at = time.monotonic()

    def stalled(
        self, names: Iterable[str], beats: dict[str, Heartbeat], holding: Callable[[str], bool]
    ) -> dict[str, str]:
        """Actor -> what is wrong with it. Actors without a heartbeat yet are still starting."""
        now, found = time.monotonic(), {}
        unseen, self._looked_at = max(0.0, now - self._looked_at - self.GAP_S), now
        for name in names:
            beat = beats.get(f"rollout/{name}")
            if beat is None:
                continue
            seen = self._seen.get(name) or Sighting(
                progress=beat.progress, age_s=beat.age_s, moved_at=now, beat_at=now
            )
            moved_at = min(now, seen["moved_at"] + unseen)
            beat_at = min(now, seen["beat_at"] + unseen)
            if beat.age_s < seen["age_s"] or beat.progress != seen["progress"]:
                beat_at = now
            if beat.progress != seen["progress"] or not holding(name):
                moved_at = now
            self._seen[name] = Sighting(
                progress=beat.progress, age_s=beat.age_s, moved_at=moved_at, beat_at=beat_at
            )
            if now - beat_at > self.stall_s:
                found[name] = f"no sign of life for {now - beat_at:.0f} s"
            elif now - moved_at > self.stall_s + self.patience_s and holding(name):
                found[name] = f"no progress for {now - moved_at:.0f} s while it holds prompts"
        return found

    def forget(self, name: str) -> None:
        self._seen.pop(name, None)


class LearnerWatch:
    """Finds a learner group that hangs during one step, by asking the ranks how far they are.

    A rank that computes, waits for groups or is ahead of the others moves or lets the others move.
    None does for ``stall_s`` seconds when one hangs in a collective or in a kernel. A rank that
    does not even answer for as long is a stopped process. Changes are timed by our own clock.
    """

    ASK_EVERY_S = 2.0

    def __init__(self, ranks: Sequence[ActorHandle], stall_s: float) -> None:
        now = time.monotonic()
        self.stall_s = stall_s
        self._ranks = list(ranks)
        self._asked: list[ray.ObjectRef[Progress] | None] = [None] * len(ranks)
        self._answered_at = [now] * len(ranks)
        self._said: list[Progress | None] = [None] * len(ranks)
        self._moved_at = now
        self._looked_at = now - self.ASK_EVERY_S

    def look(self) -> str | None:
        """What is wrong, if anything is. Returns at once."""
        import ray

        now = time.monotonic()
        if now - self._looked_at < self.ASK_EVERY_S:
            return None
        self._looked_at = now
        for number, rank in enumerate(self._ranks):
            reference = self._asked[number]
            if reference is not None and ray.wait([reference], timeout=0)[0]:
                try:
                    said = ray.get(reference)
                except ray.exceptions.RayError:  # dead: the step's own references tell
                    return None
                before = self._said[number]
                if before is None or said["moves"] != before["moves"]:
                    self._moved_at = now
                self._said[number], self._answered_at[number], reference = said, now, None
            self._asked[number] = rank.progress.remote() if reference is None else reference
        for number, answered_at in enumerate(self._answered_at):
            if now - answered_at > self.stall_s:
                return f"rank {number} has given no sign of life for {now - answered_at:.0f} s"
        if now - self._moved_at > self.stall_s:
            return f"no rank has got anywhere for {now - self._moved_at:.0f} s"
        return None

    def kill(self) -> None:
        """SIGKILL to the ranks on this host, stopped ones too; through Ray to the others."""
        import ray

        for said, rank in zip(self._said, self._ranks, strict=True):
            if said is not None and said["host"] == socket.gethostname():
                kill_worker(said["pid"], "ray::LearnerRank")
            ray.kill(rank)


def kill_worker(pid: int, title: str) -> None:
    """SIGKILL, which also ends a stopped process; only to one whose command begins with
    ``title``."""
    try:
        process = psutil.Process(pid)
        if " ".join(process.cmdline()).startswith(title):
            process.kill()
    except psutil.NoSuchProcess:
        log.info("process %d was gone already", pid)
