"""The circuit breaker in front of an endpoint that keeps failing."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """Closed until ``failures`` requests fail in a row, then one trial per ``cooldown_s`` until it
    succeeds."""

    def __init__(
        self, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._in_a_row = 0
        self._next_trial = 0.0

    @property
    def is_open(self) -> bool:
        return self._in_a_row >= self._limit

    def allow(self) -> bool:
        """Whether a request may be sent now; True on an open breaker uses up the trial of this
        cooldown."""
        if not self.is_open:
            return True
        if self._clock() < self._next_trial:
            return False
        self._next_trial = self._clock() + self._cooldown_s
        return True

    def success(self) -> None:
        self._in_a_row = 0

    def failure(self) -> None:
        self._in_a_row += 1
        self._next_trial = self._clock() + self._cooldown_s
