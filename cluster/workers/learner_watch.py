"""Notices a learner that hangs: alive, but no rank has got anywhere for too long
(docs/survival.md)."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

from avatar_rl.cluster.workers.stall_watch import kill_worker

ASK_EVERY_S = 2.0


class LearnerWatch:
    """Asks the ranks of one step how far they have come. Changes are timed by our own clock.

    A rank that computes, waits for groups or is ahead of the others moves or lets the others move;
    none does for ``stall_s`` when one hangs in a collective or in a kernel. One that does not even
    answer for as long is stopped."""

    def __init__(self, ranks: Sequence[Any], stall_s: float) -> None:
        now = time.monotonic()
        self.stall_s = stall_s
        self._ranks = list(ranks)
        self._asked: list[Any] = [None] * len(ranks)  # references of answers on their way
        self._answered = [now] * len(ranks)
        self._said: list[dict[str, Any]] = [{} for _ in ranks]
        self._moved = now
        self._looked = now - ASK_EVERY_S

    def look(self) -> str | None:
        """What is wrong, if anything is; returns at once."""
        import ray

        now = time.monotonic()
        if now - self._looked < ASK_EVERY_S:
            return None
        self._looked = now
        for number, rank in enumerate(self._ranks):
            reference = self._asked[number]
            if reference is not None and ray.wait([reference], timeout=0)[0]:
                try:
                    said = ray.get(reference)
                except ray.exceptions.RayError:  # it is dead, which the step's own references tell
                    return None
                if said.get("moves") != self._said[number].get("moves"):
                    self._moved = now
                self._said[number], self._answered[number], reference = said, now, None
            self._asked[number] = rank.progress.remote() if reference is None else reference
        for number, answered in enumerate(self._answered):
            if now - answered > self.stall_s:
                return f"rank {number} has given no sign of life for {now - answered:.0f} s"
        if now - self._moved > self.stall_s:
            return f"no rank has got anywhere for {now - self._moved:.0f} s"
        return None

    def kill(self) -> None:
        """SIGKILL to the ranks on this host, which also ends one that is stopped; through Ray to
        the others."""
        import ray

        for said, rank in zip(self._said, self._ranks, strict=True):
            if said.get("host") == socket.gethostname():
                kill_worker(int(said["pid"]), "ray::LearnerRank")
            ray.kill(rank)
