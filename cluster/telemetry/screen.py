"""What a person sees while a run is under way: one short line per step. On a terminal
live_view.py draws it instead."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

from rich.console import Console

from avatar_rl.cluster.telemetry.phase_times import PhaseTimes
from avatar_rl.common.text import printable

#: Steps whose wall time gives the ETA.
ETA_STEPS = 10
#: Seconds between two progress lines of one phase in plain output.
PLAIN_PROGRESS_S = 15.0
TRAINING = "training"
#: Seconds of a phase's last progress that give its ETA, and between two looks at it.
PACE_S, LOOK_S = 30.0, 1.0


@dataclass
class Phase:
    """One stretch of the run. Times are the screen's clock, in seconds; ``done`` and ``total`` are
    in any unit."""

    name: str
    detail: str
    started: float
    ended: float | None = None
    done: float = 0
    total: float | None = None
    expected: float | None = None  # seconds that it took before
    pace: deque[tuple[float, float]] = field(default_factory=deque)  # (done, time) lately

    def elapsed(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.started

    def advance(self, done: float, total: float | None, now: float) -> None:
        """``done`` of ``total`` by now."""
        self.done, self.total = done, total if total is not None else self.total
        if not self.pace or now - self.pace[-1][1] >= LOOK_S:
            self.pace.append((done, now))
        while len(self.pace) > 2 and now - self.pace[1][1] > PACE_S:
            self.pace.popleft()

    def eta_s(self, now: float) -> float | None:
        """Seconds left at the pace of the last ones, or as long as it took before; None where
        neither is known."""
        if self.pace and self.total:
            began, at = self.pace[0]
            if self.done > began and now > at:
                return max(0.0, self.total - self.done) * (now - at) / (self.done - began)
        if self.expected is None:
            return None
        return max(0.0, self.expected - self.elapsed(now))


class Screen:
    """What a run tells. Every call is safe from any thread, in any order, with any metrics missing.

    Use as a context manager, or ``start`` and ``stop``."""

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        times: PhaseTimes | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.title = title
        self.times = times or PhaseTimes()
        #: Hears the name of every phase that begins: a run's folder keeps it for others to see.
        self.on_phase: Callable[[str], None] = lambda name: None
        self.console = console or Console(highlight=False)
        self.metrics: dict[str, float] = {}
        self.first_accuracy: float | None = None
        self.phases: list[Phase] = []
        self.events: deque[str] = deque(maxlen=50)
        self.curve: deque[float] = deque(maxlen=200)
        self.clock = clock
        self.lock = threading.RLock()
        self._started = clock()
        self._step_times: deque[tuple[int, float]] = deque(maxlen=ETA_STEPS + 1)
        self._last_plain = -math.inf

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._started = self.clock()
        stream = self.console.file
        if isinstance(stream, TextIOWrapper) and not self.console.encoding.startswith("utf"):
            # a question in Chinese must not end a run under LANG=C
            stream.reconfigure(errors="replace")

    def stop(self) -> None:
        """The last phase ends; a second call does nothing."""
        with self.lock:
            if self.phases and self.phases[-1].ended is None:
                self.phases[-1].ended = self.clock()

    def __enter__(self) -> Screen:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def run(self, path: Path) -> None:
        """The run's folder is known, though it may not be there yet: the screen bears its name."""
        self.title = printable(path.name)
        self._plain(f"run {self.title} (avatar runs show {printable(str(path))})")

    # -- news --------------------------------------------------------------------------------------

    def phase(self, name: str, detail: str = "") -> None:
        """Begin a phase ("starting vLLM", "cold start", "training"); the one before ends. A same
        name only updates."""
        detail = printable(detail)
        with self.lock:
            now = self.clock()
            if self.phases and self.phases[-1].name == name and self.phases[-1].ended is None:
                self.phases[-1].detail = detail
                return
            if self.phases:
                self.phases[-1].ended = now
                self.times.learn(self.phases[-1].name, self.phases[-1].elapsed(now))
            phase = Phase(name, detail, now, expected=self.times.expected(name))
            self.phases.append(phase)
            self._last_plain = now
        self.on_phase(name)
        about = "" if phase.expected is None else f" (about {duration(phase.expected)})"
        self._plain((f"{name}: {detail}" if detail else name) + about)

    def progress(self, done: float, total: float | None = None, detail: str | None = None) -> None:
        """Advance the current phase: ``done`` of ``total`` (clips, SFT steps, prompts...)."""
        detail = None if detail is None else printable(detail)
        with self.lock:
            if not self.phases:
                return
            phase, now = self.phases[-1], self.clock()
            phase.advance(done, total, now)
            phase.detail = phase.detail if detail is None else detail
            finished = phase.total is not None and done >= phase.total
            if phase.name == TRAINING or (
                not finished and now - self._last_plain < PLAIN_PROGRESS_S
            ):
                # training prints its own line per step, also during an evaluation
                return
            self._last_plain = now
            left = phase.eta_s(now)
        of = f" {done:g}/{phase.total:g}" if phase.total is not None else f" {done:g}"
        eta = "" if left is None or finished else f"  eta {duration(left)}"
        self._plain(f"{phase.name}{of}{eta}" + (f"  {phase.detail}" if phase.detail else ""))

    def update(self, metrics: Mapping[str, float | None]) -> None:
        """Take a step's metrics (any part of the catalogue; None and NaN keep the value shown
        before)."""
        with self.lock:
            fresh = {
                name: float(value)
                for name, value in metrics.items()
                if value is not None and math.isfinite(value)
            }
            self.metrics.update(fresh)
            accuracy = fresh.get("eval/accuracy")
            if accuracy is not None and self.first_accuracy is None:
                self.first_accuracy = accuracy
            shown = fresh.get("accuracy/moving", fresh.get("accuracy/train"))
            if shown is not None:
                self.curve.append(shown)
            is_step = "step" in fresh and fresh["step"] >= 1
            if is_step:
                self._step_times.append((int(fresh["step"]), self.clock()))
            line = (
                step_line(self)
                if is_step
                else _evaluation_line(self)
                if accuracy is not None
                else ""
            )
        if line:
            self._plain(line)

    def event(self, message: str) -> None:
        message = printable(message)
        with self.lock:
            self.events.append(f"{time.strftime('%H:%M:%S')} {message}")
        self._plain(f"! {message}")

    # -- what is shown -----------------------------------------------------------------------------

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace of the last ones; None before two steps."""
        with self.lock:
            if len(self._step_times) < 2:
                return None
            (first, began), (last, ended) = self._step_times[0], self._step_times[-1]
        if last <= first:
            return None
        return max(0, self.total_steps - last) * (ended - began) / (last - first)

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self._started

    def waiting(self) -> tuple[float | None, float | None]:
        """Shares of the last step that the learner waited for rollouts, and the rollouts for the
        learner."""
        step = self.metrics.get("time/step")
        if not step:
            return None, None
        waits = (self.metrics.get("time/learner_wait"), self.metrics.get("time/rollout_wait"))
        learner, rollout = (None if wait is None else min(1.0, wait / step) for wait in waits)
        return learner, rollout

    def _plain(self, line: str) -> None:
        self.console.print(
            f"{duration(self.elapsed_s):>7}  {line}", markup=False, highlight=False, soft_wrap=True
        )


# -- plain lines -----------------------------------------------------------------------------------


def step_line(screen: Screen) -> str:
    """One step in at most 110 columns; a missing value is a dash."""
    metrics = screen.metrics
    learner, rollout = screen.waiting()
    width = len(str(screen.total_steps))
    parts = (
        f"step {int(metrics['step']):>{width}}/{screen.total_steps}",
        f"reward {number(metrics.get('reward/mean'), '5.2f', 5)}",
        f"acc {number(metrics.get('accuracy/moving', metrics.get('accuracy/train')), '.2f', 4)}",
        f"eval {number(metrics.get('eval/accuracy'), '.2f', 4)}",
        f"lag {number(metrics.get('staleness/mean'), '.1f', 3)}",
        f"replay {share(metrics.get('replay/share')):>3}",
        f"{number(metrics.get('rollout/tokens_per_s'), '.0f', 5)} t/s",
        f"wait L{share(learner):>4} R{share(rollout):>4}",
        f"eta {duration(screen.eta_s)}",
    )
    return "  ".join(parts)


def _evaluation_line(screen: Screen) -> str:
    now, before = screen.metrics["eval/accuracy"], screen.first_accuracy
    gain = f" ({now - before:+.3f} since the start)" if before is not None and now != before else ""
    return f"held-out accuracy {now:.3f}{gain}"


def number(value: float | None, spec: str, width: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{format(value, spec):>{width}}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def duration(seconds: float | None) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"; None -> "-"."""
    if seconds is None:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
