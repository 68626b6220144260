"""The turns of an engine that shares its device with the learner: awake in its own, else asleep."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from avatar_rl.actors.shared_state import SharedState
from avatar_rl.common.turn_lock import TurnLock

if TYPE_CHECKING:
    from avatar_rl.actors.engine.engine import RolloutEngine

LOOK_S = 0.02  # between looks whether the actor stops


class EngineTurn:
    """Puts the engine to sleep and wakes it, by whichever thread has it at the moment.

    While ``RolloutActor.run`` works, that is its engine's thread, which calls ``pass_on`` between
    two steps. Otherwise it is the one that asks (``end``, ``begin``).
    """

    def __init__(self, engine: RolloutEngine, state: SharedState, lock: TurnLock) -> None:
        self.engine, self.state, self.lock = engine, state, lock
        self._loops = False  # ``run`` works
        self._guard = threading.Lock()  # of ``_loops``, and of the engine while it does not
        self._asleep, self._awake = threading.Event(), threading.Event()
        self._awake.set()

    @property
    def is_due(self) -> bool:
        """Whether the engine's thread has to pass its turn on, or to take it up again."""
        return self.state.rest.is_set() or self.engine.asleep

    def loops(self, active: bool) -> None:
        """``run`` begins, or has ended with nothing in flight."""
        with self._guard:
            self._loops = active
            if not active and self.state.rest.is_set():
                self._sleep()

    def end(self) -> None:
        """Returns once the engine sleeps, with nothing in flight. Raises what broke the actor."""
        self.state.rest.set()
        with self._guard:
            if not self._loops:
                self._sleep()
        self._await(self._asleep)

    def begin(self) -> None:
        """Returns once the engine is awake. Raises what broke the actor."""
        self.state.rest.clear()
        with self._guard:
            if not self._loops:
                self._wake()
        self._await(self._awake)

    def pass_on(self) -> None:
        """The engine's thread, with nothing in flight: sleep until it is the engine's turn again,
        or the actor stops."""
        if self.state.rest.is_set():
            self._sleep()
        while self.state.rest.is_set() and self.state.running:
            self.state.stop.wait(LOOK_S)
        if self.state.running:
            self._wake()

    def _sleep(self) -> None:
        if self.engine.asleep:
            return
        self.engine.sleep()
        self.lock.give_back()
        self._awake.clear()
        self._asleep.set()

    def _wake(self) -> None:
        if not self.engine.asleep:
            return
        self.lock.take()
        self.engine.wake()
        self._asleep.clear()
        self._awake.set()

    def _await(self, event: threading.Event) -> None:
        while not event.wait(LOOK_S):
            if self.state.failure is not None:
                raise self.state.failure
            if not self.state.running:
                return
