"""What a death costs: who watches whom, how a death is noticed, and what happens then.

=================  =====================================  ==================  ====================
process            noticed by                             budget              what happens
=================  =====================================  ==================  ====================
rollout actor      the end of its ``run`` call;           rollout actors      replaced at once; its
                   ``StallWatch`` kills one that hangs,                       leases are given back
                   ``StartWatch`` one that freezes as it
                   starts
learner rank       its step's references;                 learner ranks       all ranks replaced,
                   ``LearnerWatch`` kills a hung group,                       from the replica
                   ``StartWatch`` one that freezes as it
                   starts
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

Where rollout actors and learner share devices (``turns.py``), "at once" is in the next turn of the
side that died.

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
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import psutil

from avatar_rl.buffer_service.control import Heartbeat
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.services.signals import Stopped, StopSignals
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


class PauseReport:
    """What the driver does while Redis has no room: it says so once, and once that it has again.

    Calls wait meanwhile (``Connection.attempt``). An order to stop ends the wait of the driver with
    Stopped. What it asks of the buffer after that fails at once.
    """

    def __init__(self, report: Report, signals: StopSignals) -> None:
        self._report, self._signals = report, signals
        self._paused = self._stopped = False

    def __call__(self, text: str, over: bool) -> bool:
        if over:
            if self._paused:
                self._report("run continues", text)
            self._paused = False
            return True
        if not self._paused:
            self._paused = True
            self._report("run paused", f"{text}; nothing is lost, it continues when there is room")
        if self._signals.asked is None:
            return True
        if not self._stopped and threading.current_thread() is threading.main_thread():
            self._stopped = True
            raise Stopped(self._signals.asked)
        return False


class RedisWatch:
    """Restarts an embedded Redis that died; clients reconnect within ``buffer.reconnect_s``.

    A context manager: its thread watches until the block ends. ``failure`` says why the server
    could not be restarted, for the driver to raise. While its disk is full it is tried again for
    ``pause_s``: with ``appendfsync: always`` Redis ends itself when it cannot write.
    """

    LOOK_S = 0.1
    TRY_S = 1.0  # between starts while the disk is full
    ROOM = 1 << 20  # bytes that must be free

    def __init__(
        self, server: EmbeddedRedis, budget: RestartBudget, report: Report, pause_s: float = 0.0
    ) -> None:
        self.server, self.budget, self._report = server, budget, report
        self.pause_s = pause_s
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
                self._await_room()
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

    def _await_room(self) -> None:
        """Returns once the disk has room, or ``pause_s`` are over: then its start says what is
        wrong."""
        folder, deadline, told = self.server.data_dir, time.monotonic() + self.pause_s, False
        while shutil.disk_usage(folder).free < self.ROOM and time.monotonic() < deadline:
            if not told:
                self._report(
                    "redis has no room",
                    f"the disk of {folder} is full: it is started when there is room",
                )
            told = True
            if self._stop.wait(self.TRY_S):
                return


class Sighting(TypedDict):
    """What a heartbeat last said, and when that last changed (our clock, seconds)."""

    progress: int
    stamp_ms: int
    moved_at: float
    beat_at: float


class Sightings:
    """When each heartbeat last changed, by our own monotonic clock.

    A heartbeat is alive when its stamp is another than at the look before. Its age is not asked:
    beats and looks of about equal periods would see the same age for minutes. Neither hosts' clocks
    nor a pause of Redis matter. Time in which nobody looked (a learner was restarted, a checkpoint
    waited for, Redis took no writes) counts as ``GAP_S`` at most, since nobody saw what happened in
    it.
    """

    GAP_S = 10.0

    def __init__(self) -> None:
        self._seen: dict[str, Sighting] = {}
        self._looked_at = time.monotonic()

    def look(self, beats: Mapping[str, Heartbeat]) -> dict[str, Sighting]:
        """What is known of all ``beats`` after this look; the others are forgotten."""
        now = time.monotonic()
        unseen, self._looked_at = max(0.0, now - self._looked_at - self.GAP_S), now
        known: dict[str, Sighting] = {}
        for who, beat in beats.items():
            seen = self._seen.get(who) or Sighting(
                progress=beat.progress, stamp_ms=beat.stamp_ms, moved_at=now, beat_at=now
            )
            moved_at, beat_at = (min(now, seen[at] + unseen) for at in ("moved_at", "beat_at"))
            moved, beaten = beat.progress != seen["progress"], beat.stamp_ms != seen["stamp_ms"]
            known[who] = Sighting(
                progress=beat.progress,
                stamp_ms=beat.stamp_ms,
                moved_at=now if moved else moved_at,
                beat_at=now if beaten or moved else beat_at,
            )
        self._seen = known
        return known

    def rest(self, who: str) -> None:
        """It had nothing to do: its progress is not waited for."""
        self._seen[who]["moved_at"] = time.monotonic()

    def forget(self, who: str) -> None:
        self._seen.pop(who, None)


class StallWatch:
    """Finds rollout actors that hang: no heartbeat, or no progress while they hold prompts.

    Args:
        stall_s: Seconds without a change (see ``Sightings``) after which an actor counts as hung.
        patience_s: Seconds more for actors that hold prompts; a judge may keep them waiting.
    """

    def __init__(self, stall_s: float, patience_s: float = 0.0) -> None:
        self.stall_s, self.patience_s = stall_s, patience_s
        self._sightings = Sightings()

    def stalled(
        self, names: Iterable[str], beats: dict[str, Heartbeat], holding: Callable[[str], bool]
    ) -> dict[str, str]:
        """Actor -> what is wrong with it. Actors without a heartbeat yet are still starting."""
        found = {}
        theirs = {name: f"rollout/{name}" for name in names if f"rollout/{name}" in beats}
        known = self._sightings.look({who: beats[who] for who in theirs.values()})
        now = time.monotonic()
        for name, who in theirs.items():
            holds, seen = holding(name), known[who]
            if not holds:
                self._sightings.rest(who)
            if now - seen["beat_at"] > self.stall_s:
                found[name] = f"no sign of life for {now - seen['beat_at']:.0f} s"
            elif now - seen["moved_at"] > self.stall_s + self.patience_s and holds:
                found[name] = (
                    f"no progress for {now - seen['moved_at']:.0f} s while it holds prompts"
                )
        return found

    def forget(self, name: str) -> None:
        self._sightings.forget(f"rollout/{name}")


class ActorProcess(NamedTuple):
    """Where Ray runs an actor that has got a place."""

    pid: int
    is_here: bool  # on this node


def actor_process(actor: ActorHandle) -> ActorProcess | None:
    """The process of an actor, also while its constructor runs; None while it waits for a place."""
    import ray

    # The public ray.util.state asks the dashboard, which a local run does not have.
    from ray._private import state

    found = state.actors(actor._actor_id.hex())
    if not found.get("Pid"):
        return None
    node = found.get("Address", {}).get("NodeID")
    return ActorProcess(found["Pid"], node == ray.get_runtime_context().get_node_id())


class StartWatch:
    """Ends processes that freeze while they start: they beat no more, or have never beaten.

    One that waits for a place has no process yet: ``resources.start_timeout_s`` counts for it.

    Args:
        beats: Reads the latest heartbeats.
        stall_s: Seconds without a beat after which a starting process counts as frozen.
        process_of: Finds the process of an actor that has not beaten.
    """

    LOOK_S = 2.0

    def __init__(
        self,
        beats: Callable[[], dict[str, Heartbeat]],
        stall_s: float,
        process_of: Callable[[ActorHandle], ActorProcess | None] = actor_process,
    ) -> None:
        self.stall_s = stall_s
        self._beats, self._process_of, self._sightings = beats, process_of, Sightings()
        self._placed_at: dict[str, float] = {}  # those that have a process and have not beaten
        self._looked_at = -self.LOOK_S

    def look(self, starting: Mapping[str, ActorHandle]) -> None:
        """Kill those of ``starting`` ("role/id" -> handle) that are frozen; its start then fails.
        Looks every ``LOOK_S`` at most."""
        if time.monotonic() - self._looked_at < self.LOOK_S or not starting:
            return
        beats = self._beats()
        unseen = max(0.0, time.monotonic() - self._looked_at - Sightings.GAP_S)
        self._looked_at = time.monotonic()
        known = self._sightings.look({who: beats[who] for who in starting if who in beats})
        for who, seen in known.items():
            silent = self._looked_at - seen["beat_at"]
            if silent > self.stall_s:
                log.warning("%s gave no sign of life for %.0f s while it started", who, silent)
                is_here = beats[who].host == socket.gethostname()
                self._kill(ActorProcess(beats[who].pid, is_here), starting[who])
        self._look_for_silent({w: a for w, a in starting.items() if w not in beats}, unseen)

    def _look_for_silent(self, silent: Mapping[str, ActorHandle], unseen: float) -> None:
        """Those without any beat: their time counts from when they were first seen with a
        process, but for the time in which nobody looked."""
        placed = {}
        for who, actor in silent.items():
            process = self._process_of(actor)
            if process is None:
                continue
            since = self._placed_at.get(who, self._looked_at) + unseen
            placed[who] = min(since, self._looked_at)
            if self._looked_at - placed[who] > self.stall_s:
                log.warning("%s has a process and has not beaten for %.0f s", who, self.stall_s)
                del placed[who]
                self._kill(process, actor)
        self._placed_at = placed

    @staticmethod
    def _kill(process: ActorProcess, actor: ActorHandle) -> None:
        import ray

        if process.is_here:  # a stopped process does not hear Ray
            kill_worker(process.pid, "ray::")
        ray.kill(actor)


class LearnerWatch:
    """Finds a learner group that hangs during one step, by asking the ranks how far they are.

    A rank that computes, waits for groups or is ahead of the others moves or lets the others move.
    None does for ``stall_s`` seconds when one hangs in a collective or in a kernel. A rank that
    does not even answer for as long is a stopped process. Changes are timed by our own clock.
    """

    ASK_EVERY_S = 2.0
    GAP_S = 10.0  # at most this counts of a time in which nobody looked, as in ``Sightings``

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
        unseen, self._looked_at = max(0.0, now - self._looked_at - self.GAP_S), now
        self._moved_at += unseen
        self._answered_at = [at + unseen for at in self._answered_at]
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
