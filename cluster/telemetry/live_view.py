"""The screen on a terminal: a live view that is laid out anew at each refresh."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from avatar_rl.cluster.telemetry.phase_times import PhaseTimes
from avatar_rl.cluster.telemetry.screen import TRAINING, Screen, duration, number, share

#: Wider terminals gain nothing from longer bars.
MAX_WIDTH = 120
#: Lines of a terminal with room for more than the essentials.
TALL = 24
#: Why a tier may be empty (docs/method.md 1.3).
EMPTY = {
    "easy": "Easy is empty: no prompt stands above the others yet, or is always solved",
    "medium": "Medium is empty: prompts are always or never solved, nothing between",
    "hard": "Hard is empty: no prompt stands below the others any more, or is never solved",
}


def open_screen(
    mode: Literal["auto", "live", "plain"],
    total_steps: int,
    *,
    title: str = "",
    times: PhaseTimes | None = None,
) -> Screen:
    """The recipe's `screen`; auto asks the console."""
    console = Console(highlight=False)
    is_live = console.is_terminal and not console.is_dumb_terminal
    kind = LiveScreen if mode == "live" or (mode == "auto" and is_live) else Screen
    return kind(total_steps, title=title, console=console, times=times)


class LiveScreen(Screen):
    """The same news as a live view; the terminal is restored at exit too, whatever happened."""

    _live: Live | None = None

    def start(self) -> None:
        super().start()
        if self._live is None:
            # a buffer of its own: a window that changes its size leaves no torn frames behind
            self._live = Live(View(self), console=self.console, refresh_per_second=4, screen=True)
            self._live.start()
            atexit.register(self.stop)

    def stop(self) -> None:
        """Leave the last view on the terminal and give the cursor back; a second call does
        nothing."""
        super().stop()
        with self.lock:
            live, self._live = self._live, None
        # outside the lock: stopping waits for the refresh thread, which may want it
        if live is not None:
            live.stop()
            atexit.unregister(self.stop)
            self.console.print(View(self))  # what stays on the terminal

    def _plain(self, line: str) -> None:
        """Nothing: the view shows it."""


class View:
    """Lays the screen out anew at each refresh, for the width the terminal has by then."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.screen.lock:
            width = min(options.max_width, MAX_WIDTH)
            inner = width - 4
            glyphs = ("#", "=", ".") if options.ascii_only else ("█", "▓", "░")
            body: list[RenderableType] = [*self._phases(inner)]
            if self.screen.metrics:
                body += [
                    Text(""),
                    self._facts(inner, glyphs, options.ascii_only),
                    *self._tiers(inner, glyphs),
                    *([_facts_line(self.screen.metrics)] if console.height >= TALL else []),
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
        else:
            head.append(f"  {done:g}/{total:g}" if total else "")
            if (left := phase.eta_s(now)) is not None:
                head.append(f"  ETA {duration(left)}")
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
        empty = [name for name, count in zip(names, known, strict=True) if not count]
        reasons = [Text(f"             {EMPTY[name]}", style="dim") for name in empty[:1]]
        return [Text(""), bar, *reasons]


def _facts_line(metrics: Mapping[str, float]) -> Text:
    """What an expert looks at first, where a line is left for it."""
    parts = [
        f"{label} {number(metrics.get(name), spec)}{unit}"
        for name, label, spec, unit in (
            ("lr", "lr", ".2g", ""),
            ("grad_norm", "grad", ".2g", ""),
            ("entropy", "entropy", ".2f", ""),
            ("completion/length_mean", "length", ".0f", ""),
            ("memory/learner_gpu", "GPU", ".1f", " GiB"),
            ("memory/learner", "learner", ".1f", " GiB"),
            ("memory/host", "host", ".1f", " GiB"),
        )
        if metrics.get(name) is not None
    ]
    return Text("  ".join(parts), style="dim", overflow="ellipsis", no_wrap=True)


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
