"""Notices rollout actors that stand still, and ends a process that hears nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import psutil

from avatar_rl.buffer_service.control import Heartbeat

log = logging.getLogger(__name__)


class StallWatch:
    """Tells actors that stand still: no sign of life, or the same progress while they hold work,
    for ``stall_s``.

    Changes are timed by our own clock, so neither hosts' clocks nor a pause of Redis matter. Time
    in which nobody looked (a learner was restarted, a checkpoint waited for) counts as ``GAP_S`` at
    most: nobody saw what came in it."""

    GAP_S = 10.0

    def __init__(self, stall_s: float, patience_s: float = 0.0) -> None:
        self.stall_s = stall_s
        self.patience_s = (
            patience_s  # more for those that hold work: somebody else may keep them waiting so long
        )
        self._seen: dict[
            str, tuple[int, float, float, float]
        ] = {}  # name -> progress, age, moved at, beaten at
        self._looked = time.monotonic()

    def stalled(
        self, names: Iterable[str], beats: dict[str, Heartbeat], holding: Callable[[str], bool]
    ) -> dict[str, str]:
        """Name -> what is wrong with it. Actors that have never beaten are still starting and are
        left alone."""
        now, found = time.monotonic(), {}
        unseen, self._looked = max(0.0, now - self._looked - self.GAP_S), now
        for name in names:
            beat = beats.get(f"rollout/{name}")
            if beat is None:
                continue
            progress, age, moved, beaten = self._seen.get(
                name, (beat.progress, beat.age_s, now, now)
            )
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
    """SIGKILL, which also ends a process that is stopped and hears nothing else; only to one that
    bears ``title``."""
    try:
        process = psutil.Process(pid)
        if " ".join(process.cmdline()).startswith(title):
            process.kill()
    except psutil.NoSuchProcess:
        log.info("process %d was gone already", pid)
