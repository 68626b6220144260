"""What a person sees while a run is under way: a live view on a terminal, one short line per step
elsewhere."""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import pairwise
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

#: Steps whose wall time gives the ETA.
ETA_STEPS = 10
#: Seconds between two progress lines of one phase in plain output.
PLAIN_PROGRESS_S = 15.0
TRAINING = "training"
#: Wider terminals gain nothing from longer bars.
MAX_WIDTH = 120


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

    def elapsed(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.started


class Screen:
    """The run's face. Every call is safe from any thread, in any order, with any metrics missing.

    ``is_terminal`` None asks the console; False prints plain lines. Use as a context manager, or
    ``start`` and ``stop``; the terminal is restored at exit too, whatever happened."""

    def __init__(
        self,
        total_steps: int,
        is_terminal: bool | None = None,
        *,
        title: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.title = title
        self.console = console or Console(highlight=False)
        is_live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.is_terminal = is_live if is_terminal is None else is_terminal
        self.metrics: dict[str, float] = {}
        self.first_accuracy: float | None = None
        self.phases: list[Phase] = []
        self.events: deque[str] = deque(maxlen=50)
        self.curve: deque[float] = deque(maxlen=200)
        self.clock = clock
        self._started = clock()
        self._step_times: deque[tuple[int, float]] = deque(maxlen=ETA_STEPS + 1)
        self._last_plain = -math.inf
        self._lock = threading.RLock()
        self._live: Live | None = None

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._started = self.clock()
        stream = self.console.file
        if isinstance(stream, TextIOWrapper) and not self.console.encoding.startswith("utf"):
            stream.reconfigure(
                errors="replace"
            )  # a question in Chinese must not end a run under LANG=C
        if self.is_terminal and self._live is None:
            self._live = Live(_View(self), console=self.console, refresh_per_second=4)
            self._live.start()
            atexit.register(self.stop)

    def stop(self) -> None:
        """Leave the last view on the terminal and give the cursor back; a second call does
        nothing."""
        with self._lock:
            if self.phases and self.phases[-1].ended is None:
                self.phases[-1].ended = self.clock()
            live, self._live = self._live, None
        if (
            live is not None
        ):  # outside the lock: stopping waits for the refresh thread, which may want it
            live.stop()
            atexit.unregister(self.stop)

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

    # -- news --------------------------------------------------------------------------------------

    def phase(self, name: str, detail: str = "") -> None:
        """Begin a phase ("starting vLLM", "cold start", "training"); the one before ends. A same
        name only updates."""
        with self._lock:
            now = self.clock()
            if self.phases and self.phases[-1].name == name and self.phases[-1].ended is None:
                self.phases[-1].detail = detail
                return
            if self.phases:
                self.phases[-1].ended = now
            self.phases.append(Phase(name, detail, now))
            self._last_plain = now
        self._plain(f"{name}: {detail}" if detail else name)

    def progress(self, done: float, total: float | None = None, detail: str | None = None) -> None:
        """Advance the current phase: ``done`` of ``total`` (clips, SFT steps, prompts...)."""
        with self._lock:
            if not self.phases:
                return
            phase, now = self.phases[-1], self.clock()
            phase.done, phase.total = done, total if total is not None else phase.total
            phase.detail = phase.detail if detail is None else detail
            finished = phase.total is not None and done >= phase.total
            if phase.name == TRAINING or (
                not finished and now - self._last_plain < PLAIN_PROGRESS_S
            ):
                # training prints its own line per step, also while an evaluation goes on beside it
                return
            self._last_plain = now
        of = f" {done:g}/{phase.total:g}" if phase.total is not None else f" {done:g}"
        self._plain(f"{phase.name}{of}" + (f"  {phase.detail}" if phase.detail else ""))

    def update(self, metrics: Mapping[str, float | None]) -> None:
        """Take a step's metrics (any part of the catalogue; None and NaN keep the value shown
        before)."""
        with self._lock:
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
        with self._lock:
            self.events.append(f"{time.strftime('%H:%M:%S')} {message}")
        self._plain(f"! {message}")

    # -- what is shown -----------------------------------------------------------------------------

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace of the last ones; None before two steps."""
        with self._lock:
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
        if not self.is_terminal:
            self.console.print(
                f"{duration(self.elapsed_s):>7}  {line}",
                markup=False,
                highlight=False,
                soft_wrap=True,
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


# -- live view -------------------------------------------------------------------------------------


class _View:
    """Lays the screen out anew at each refresh, for the width the terminal has by then."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.screen._lock:
            width = min(options.max_width, MAX_WIDTH)
            inner = width - 4
            glyphs = ("#", "=", ".") if options.ascii_only else ("█", "▓", "░")
            body: list[RenderableType] = [*self._phases(inner)]
            if self.screen.metrics:
                body += [
                    Text(""),
                    self._facts(inner, glyphs, options.ascii_only),
                    *self._tiers(inner, glyphs),
                ]
            room = max(0, min(5, console.height - 15 - 2 * len(body)))
            recent = list(self.screen.events)[-room:] if room else []
            if recent:
                body += [
                    Text(""),
                    *(
                        Text(line, style="dim", overflow="ellipsis", no_wrap=True)
                        for line in recent
                    ),
                ]
            name = self.screen.title or "AVATAR-RL"
            title = Text(name, style="bold", overflow="ellipsis")
            yield Panel(
                Group(*body),
                title=title,
                title_align="left",
                subtitle=duration(self.screen.elapsed_s),
                width=width,
            )

    def _phases(self, inner: int) -> Sequence[RenderableType]:
        now, phases = self.screen.clock(), self.screen.phases
        if not phases:
            return [Text("starting")]
        past = "  ".join(f"{phase.name} {duration(phase.elapsed(now))}" for phase in phases[:-1])
        rows: list[RenderableType] = [Text(past, style="dim")] if past else []
        phase = phases[-1]
        done, total = phase.done, phase.total
        head = Text.assemble((phase.name, "bold cyan"), f"  {duration(phase.elapsed(now))}")
        if phase.name == TRAINING:
            done, total = self.screen.metrics.get("step", 0), self.screen.total_steps
            head.append(f"  step {done:g}/{total:g}  ETA {duration(self.screen.eta_s)}")
        elif total:
            head.append(f"  {done:g}/{total:g}")
        if phase.detail:
            head.append(f"  {phase.detail}", style="dim")
        rows.append(head)
        if total:
            rows.append(
                ProgressBar(
                    total=total, completed=min(done, total), width=inner, complete_style="cyan"
                )
            )
        return rows

    def _facts(self, inner: int, glyphs: tuple[str, str, str], ascii_only: bool) -> RenderableType:
        half = (inner - 3) // 2
        left, right = self._learning(half - 14, ascii_only), self._flow(glyphs)
        if inner < 72:
            return _rows(left + right)
        grid = Table.grid(padding=(0, 3))
        grid.add_column(width=half)
        grid.add_column(width=inner - half - 3)
        grid.add_row(_rows(left), _rows(right))
        return grid

    def _learning(self, width: int, ascii_only: bool) -> list[tuple[str, Text]]:
        metrics = self.screen.metrics
        now, before = metrics.get("eval/accuracy"), self.screen.first_accuracy
        held_out = Text("-" if now is None else f"{now:.3f}", style="bold")
        if now is not None and before is not None and now != before:
            gain = now - before
            held_out = Text.assemble(
                f"{before:.3f} to ", held_out, (f"  {gain:+.3f}", "green" if gain > 0 else "red")
            )
        moving = Text(number(metrics.get("accuracy/moving", metrics.get("accuracy/train")), ".3f"))
        if not ascii_only and len(self.screen.curve) > 1:
            moving.append(
                "  " + sparkline(list(self.screen.curve), max(4, min(24, width - 8))), style="cyan"
            )
        sign = "+/-" if ascii_only else "±"
        reward = Text(
            f"{number(metrics.get('reward/mean'), '.3f')} {sign} "
            f"{number(metrics.get('reward/std'), '.3f')}"
        )
        kl = (
            f"{number(metrics.get('kl/reference'), '.2g')} / "
            f"{number(metrics.get('kl/behaviour'), '.2g')}"
        )
        dead = (
            f"{share(metrics.get('groups/dead_before'))}, after replay "
            f"{share(metrics.get('groups/dead_after'))}"
        )
        completions = f"{number(metrics.get('completions/generated'), ',.0f')} generated"
        return [
            ("held-out", held_out),
            ("train acc", moving),
            ("reward", reward),
            ("KL ref/beh", Text(kl)),
            ("dead groups", Text(dead)),
            ("completions", Text(completions)),
        ]

    def _flow(self, glyphs: tuple[str, str, str]) -> list[tuple[str, Text]]:
        metrics = self.screen.metrics
        learner, rollout = self.screen.waiting()
        replay = metrics.get("replay/share")
        trained = Text("-")
        if replay is not None:
            cells = round(8 * min(1.0, max(0.0, replay)))
            trained = Text.assemble(
                (glyphs[0] * (8 - cells), "blue"), (glyphs[1] * cells, "yellow")
            )
            trained.append(f" {share(replay)} replayed")
        stale = (
            f"lag {number(metrics.get('staleness/mean'), '.1f')}, max "
            f"{number(metrics.get('staleness/max'), '.0f')}"
        )
        hints = f", hints on {metrics['hints/active']:.0f}" if metrics.get("hints/active") else ""
        return [
            ("version", Text(f"{number(metrics.get('version'), '.0f')}  {stale}")),
            ("trained", trained),
            (
                "rollouts",
                Text(
                    f"{number(metrics.get('rollout/tokens_per_s'), ',.0f')} tok/s, waits "
                    f"{share(rollout)}"
                ),
            ),
            (
                "learner",
                Text(
                    f"{number(metrics.get('learner/tokens_per_s'), ',.0f')} tok/s, waits "
                    f"{share(learner)}"
                ),
            ),
            ("held up by", Text(held_up_by(learner, rollout))),
            ("buffer", Text(f"{number(metrics.get('buffer/stored'), ',.0f')} stored{hints}")),
        ]

    def _tiers(self, inner: int, glyphs: tuple[str, str, str]) -> list[RenderableType]:
        names = ("easy", "medium", "hard")
        counts = [self.screen.metrics.get(f"tiers/{name}") for name in names]
        if any(count is None for count in counts) or not sum(count or 0 for count in counts):
            return []
        known = [count or 0 for count in counts]
        legend = "  ".join(
            f"{name.title()} {count:,.0f}" for name, count in zip(names, known, strict=True)
        )
        room = max(10, inner - len(legend) - 15)
        bar = Text("tiers        ", style="dim")
        edges = [round(room * sum(known[:end]) / sum(known)) for end in range(4)]
        for index, colour in enumerate(("green", "yellow", "magenta")):
            bar.append(glyphs[index] * (edges[index + 1] - edges[index]), style=f"not dim {colour}")
        bar.append(f"  {legend}", style="not dim")
        return [Text(""), bar]


def held_up_by(learner_wait: float | None, rollout_wait: float | None) -> str:
    """Which side is the bottleneck, from the shares of the step that each side waited."""
    if learner_wait is None or rollout_wait is None:
        return "-"
    if max(learner_wait, rollout_wait) < 0.05:
        return "neither side"
    return "rollouts" if learner_wait >= rollout_wait else "the learner"


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` averaged into at most ``width`` cells, scaled between their extremes."""
    cells = min(width, len(values))
    edges = [round(index * len(values) / cells) for index in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / span))] for mean in means)


def _rows(rows: Sequence[tuple[str, Text]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=11, no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for label, value in rows:
        table.add_row(label, value)
    return table
