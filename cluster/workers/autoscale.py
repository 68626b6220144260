"""How many rollout actors a run should have: grow while the learner waits, shrink while the
rollouts wait."""

from __future__ import annotations

from dataclasses import dataclass

#: Shares of a step's wall time. The gap between high and low is the hysteresis: in between nothing
#: changes.
LEARNER_WAITS = 0.25
ROLLOUTS_WAIT = 0.5
IDLE = 0.1
PATIENCE = 3  # steps in a row that must say the same
COOLDOWN = 3  # steps after a change whose waits still show the old size


@dataclass
class Autoscaler:
    """One actor at a time, within [smallest, largest]. Feed it every step."""

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
