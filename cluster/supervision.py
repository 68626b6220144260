"""Watching over a run: budgets of deaths, a Redis that comes back, actors that stand still, orders to stop."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import psutil

from buffer_service.control import Beat
from buffer_service.server import EmbeddedRedis
from prompts.errors import AvatarError, ResourceError

log = logging.getLogger(__name__)

Report = Callable[[str, str], None]  # kind, message


class Budget:
    """Deaths of one kind of process allowed between two signs of progress."""

    def __init__(self, limit: int, what: str) -> None:
        self.limit, self.what = limit, what
        self.spent = self.total = 0

    def spend(self, reason: str) -> None:
        """Raises ResourceError when there were too many."""
        self.spent += 1
        self.total += 1
        if self.spent > self.limit:
            raise ResourceError(
                f"{self.what} died {self.spent} times without a finished step, last: {reason}; see the logs folder of "
                "the run, or raise supervision.restarts"
            )

    def progress(self) -> None:
        self.spent = 0


class Stopped(KeyboardInterrupt):
    """Somebody asked the run to stop and it does so in order. ``number`` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def stop_at_once(number: int, frame: Any) -> NoReturn:
    """A handler of SIGTERM while there is nothing to save: pre-empted in its setup, a run is in order, too."""
    raise Stopped(number)


class StopSignals:
    """SIGTERM and the first Ctrl-C ask; the run answers at its next look. A second one interrupts at once.

    Outside ``orderly`` (while there is nothing to save) both act at once: SIGTERM raises Stopped, Ctrl-C interrupts.
    """

    def __init__(self, on_ask: Callable[[], None] = lambda: None) -> None:
        self.asked: int | None = None
        self.asked_at = 0.0
        self.orderly = False
        self._on_ask = on_ask
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Must run in the main thread; elsewhere signals stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def waited(self) -> float:
        """Seconds since the order to stop."""
        return time.monotonic() - self.asked_at if self.asked is not None else 0.0

    def _handle(self, number: int, frame: Any) -> None:
        if not self.orderly and self.asked is None and number == signal.SIGTERM:
            stop_at_once(number, frame)
        if not self.orderly or self.asked is not None:
            raise KeyboardInterrupt
        self.asked, self.asked_at = number, time.monotonic()
        self._on_ask()


class RedisKeeper:
    """Starts an embedded Redis again when it dies; its clients reconnect within ``buffer.reconnect_s``."""

    LOOK_S = 0.1

    def __init__(self, server: EmbeddedRedis, budget: Budget, report: Report) -> None:
        self.server, self._budget, self._report = server, budget, report
        self.failure: AvatarError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="redis-supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns once it will not start the server any more."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.LOOK_S):
            if self.server.pid is not None:
                continue
            started = time.monotonic()
            try:
                self._budget.spend("redis-server")
                self.server.start()
            except AvatarError as error:
                self.failure = error
                return
            seconds = time.monotonic() - started
            self._report("redis restarted", f"it died and is back from its append-only file ({seconds:.2f} s)")


class StallWatch:
    """Tells actors that stand still: no sign of life, or the same progress while they hold work, for ``stall_s``.

    Changes are timed by our own clock, so neither hosts' clocks nor a pause of Redis matter. Time in which nobody
    looked (a learner was restarted, a checkpoint waited for) counts as ``GAP_S`` at most: nobody saw what came in it.
    """

    GAP_S = 10.0

    def __init__(self, stall_s: float, patience_s: float = 0.0) -> None:
        self.stall_s = stall_s
        self.patience_s = patience_s  # more for those that hold work: somebody else may keep them waiting so long
        self._seen: dict[str, tuple[int, float, float, float]] = {}  # name -> progress, age, moved at, beaten at
        self._looked = time.monotonic()

    def stalled(self, names: Iterable[str], beats: dict[str, Beat], holding: Callable[[str], bool]) -> dict[str, str]:
        """Name -> what is wrong with it. Actors that have never beaten are still starting and are left alone."""
        now, found = time.monotonic(), {}
        unseen, self._looked = max(0.0, now - self._looked - self.GAP_S), now
        for name in names:
            beat = beats.get(f"rollout/{name}")
            if beat is None:
                continue
            progress, age, moved, beaten = self._seen.get(name, (beat.progress, beat.age_s, now, now))
            moved, beaten = min(now, moved + unseen), min(now, beaten + unseen)
            if beat.age_s < age or beat.progress != progress:
                beaten = now
            if beat.progress != progress or not holding(name):
                moved = now
            self._seen[name] = (beat.progress, beat.age_s, moved, beaten)
            if now - beaten > self.stall_s:
                found[name] = f"no sign of life for {now - beaten:.0f} s"
            elif now - moved > self.stall_s + self.patience_s and holding(name):
                found[name] = f"no progress for {now - moved:.0f} s while it holds prompts"
        return found

    def forget(self, name: str) -> None:
        self._seen.pop(name, None)


def kill_worker(pid: int, title: str) -> None:
    """SIGKILL, which also ends a process that is stopped and hears nothing else; only to one that bears ``title``."""
    try:
        process = psutil.Process(pid)
        if " ".join(process.cmdline()).startswith(title):
            process.kill()
    except psutil.NoSuchProcess:
        log.info("process %d was gone already", pid)
