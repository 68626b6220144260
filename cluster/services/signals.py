"""Orders to stop: SIGTERM and Ctrl-C, answered between two looks of the run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn, TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and does so in order. ``number`` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


#: What ``stop_at_once`` has raised.
orders: list[Stopped] = []


def stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """A handler of SIGTERM while there is nothing to save: a run that is pre-empted while it sets
    up ends in order, too."""
    orders.append(Stopped(number))
    raise orders[-1]


def as_stopped(interrupt: KeyboardInterrupt) -> Stopped | None:
    """The order to stop behind an interrupt; None for Ctrl-C. A call that waits in Ray passes a
    plain KeyboardInterrupt on in place of what the handler raised."""
    if isinstance(interrupt, Stopped):
        return interrupt
    return orders.pop() if orders else None


class StopSignals:
    """SIGTERM and the first Ctrl-C ask; the run answers at its next look. A second signal
    interrupts at once.

    Outside ``orderly`` (while there is nothing to save) both act at once: SIGTERM raises Stopped,
    Ctrl-C interrupts. A context manager, to be entered in the main thread; in another one signals
    stay as they are.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.asked_at = 0.0
        self.orderly = False
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.orderly = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def waited(self) -> float:
        """Seconds since the order to stop."""
        return time.monotonic() - self.asked_at if self.asked is not None else 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.orderly and self.asked is None and number == signal.SIGTERM:
            stop_at_once(number, frame)
        if not self.orderly or self.asked is not None:
            raise KeyboardInterrupt
        self.asked, self.asked_at = number, time.monotonic()
