"""Whose turn it is, where rollout actors and learner share devices (resources.colocate)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar, Literal

from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet

Look = Callable[[], None]


def _nothing() -> None: ...


class Turns:
    """Rollout actors and learner have devices of their own: both work at any time."""

    alternate: ClassVar[bool] = False

    def rollouts(self, look: Look = _nothing) -> None:
        """Returns once rollout actors may work. ``look`` is called meanwhile."""

    def learner(self, look: Look = _nothing) -> None:
        """Returns once the learner may work. ``look`` is called meanwhile."""

    def metrics(self) -> dict[str, float]:
        """Of the step: what taking turns cost."""
        return {}


class SharedDevice(Turns):
    """Rollout engines and learner ranks on the same devices, never at work together.

    The order is: the engines finish what they have, sleep and give their lock back; the ranks take
    it, work, leave the device and give it back; the engines wake. Each side says when it has. What
    dies in the other's turn is replaced in its own. ``common/turn_lock.py`` holds even where this
    order would fail.

    The learner's turn comes first: it starts when the engines are up and asleep.
    """

    alternate = True

    def __init__(self, fleet: RolloutFleet, learner: LearnerGroup) -> None:
        self.fleet, self._learner = fleet, learner
        self.whose: Literal["learner", "rollouts"] = "learner"
        self._spent = 0.0

    def rollouts(self, look: Look = _nothing) -> None:
        """Raises what ends a run: too many deaths, what ``look`` raises."""
        if self.whose == "rollouts":
            return
        start = time.perf_counter()
        self._learner.end_turn(look)
        self.fleet.begin_turn(look)
        self.whose = "rollouts"
        self._spent += time.perf_counter() - start

    def learner(self, look: Look = _nothing) -> None:
        """Raises what ends a run: too many deaths, what ``look`` raises."""
        if self.whose == "learner":
            return
        start = time.perf_counter()
        self.fleet.end_turn(look)
        self._learner.begin_turn(look)
        self.whose = "learner"
        self._spent += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds since the last call."""
        spent, self._spent = self._spent, 0.0
        return {"time/turns": spent}
