"""Orders to stop: SIGTERM and Ctrl-C, answered between two looks of the run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn


class Stopped(KeyboardInterrupt):
    """Somebody asked the run to stop and it does so in order. ``number`` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def stop_at_once(number: int, frame: Any) -> NoReturn:
    """A handler of SIGTERM while there is nothing to save: pre-empted in its setup, a run is in
    order, too."""
    raise Stopped(number)


class StopSignals:
    """SIGTERM and the first Ctrl-C ask; the run answers at its next look. A second one interrupts
    at once.

    Outside ``orderly`` (while there is nothing to save) both act at once: SIGTERM raises Stopped,
    Ctrl-C interrupts."""

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
