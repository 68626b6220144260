"""One run as text on a terminal: figures, curves, the last saved groups with their completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.bar import Bar
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from avatar_rl.cluster.telemetry.run_files import RunStatus, Sample, read_status
from avatar_rl.cluster.view.reading import Faults, columns, events_of, metrics_of
from avatar_rl.cluster.view.rollouts import Rollouts, SampleFile
from avatar_rl.common.text import printable, shortened
from avatar_rl.common.types import Json

BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = (
    "eval/accuracy",
    "accuracy/moving",
    "reward/mean",
    "groups/dead_before",
    "groups/dead_after",
    "entropy",
    "kl/behaviour_capped",
    "completion/length_mean",
    "rollout/tokens_per_s",
)
SHOWN_GROUPS, SHOWN_EVENTS, WIDTH = 3, 6, 40
STATE_COLOURS = {"finished": "green", "failed": "red", "lost": "red", "interrupted": "yellow"}


def show(run: Path, console: Console | None = None) -> int:
    """Print ``run``. Raises DataError where it is none."""
    status = read_status(run)
    console = console or Console(highlight=False)
    faults = Faults()
    console.print(_head(run, status))
    console.print(_curves(run, faults))
    rollouts = Rollouts(run)
    training = [file for file in rollouts.files() if not file.held_out and file.groups]
    for file in training[-1:]:
        console.print(_groups(rollouts, file))
    if not training:
        console.print(Text("no samples are saved yet", style="dim"))
    last = events_of(run, faults)["last"]
    for row in cast("list[dict[str, Json]]", last)[-SHOWN_EVENTS:]:
        said = f"step {row.get('step')}: {row.get('kind')}: {row.get('message')}"
        console.print(Text(printable(said), style="dim"))
    for fault in [*faults.said, *(fault for file in rollouts.files() for fault in file.faults)]:
        console.print(Text(printable(fault), style="yellow"))
    return 0


def _head(run: Path, status: RunStatus) -> Group:
    state = "lost" if status.lost else status.state
    line = Text(printable(run.name), style="bold")
    line.append(f"  {state}", style=STATE_COLOURS.get(state, "cyan"))
    total = status.total_steps
    line.append(f"  step {status.step}" + (f" of {total}" if total else ""))
    if status.accuracy_now is not None:
        before = "" if status.accuracy_before is None else f"{status.accuracy_before:.3f} to "
        line.append(f"  held-out {before}{status.accuracy_now:.3f}", style="bold green")
    parts: list[Text | Bar] = [line]
    if total:
        parts.append(Bar(total, 0, status.step, width=WIDTH, color="blue"))
    if status.error:
        parts.append(Text(printable(status.error), style="red"))
    return Group(*parts)


def _curves(run: Path, faults: Faults) -> Table:
    found = columns(metrics_of(run, faults))["curves"]
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in CURVES:
        points = found.get(name) if isinstance(found, dict) else None
        pairs = points if isinstance(points, list) else []
        values = [cast("list[float]", pair)[1] for pair in pairs]
        if values:
            table.add_row(
                Text(name, style="dim"), Text(spark(values), style="cyan"), f"{values[-1]:.4g}"
            )
    return table


def spark(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve in one line of block letters."""
    picked = [values[round(i * (len(values) - 1) / max(1, width - 1))] for i in range(width)]
    chosen = list(values) if len(values) <= width else picked
    low, high = min(chosen), max(chosen)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in chosen)


def _groups(rollouts: Rollouts, file: SampleFile) -> Group:
    panels = []
    for number in range(min(SHOWN_GROUPS, len(file.groups))):
        rows = rollouts.group(file.name, number)
        if rows:
            panels.append(_panel(rows, file.step))
    return Group(*panels)


def _panel(rows: Sequence[Sample], step: int) -> Panel:
    first = rows[0]
    table = Table(box=None, pad_edge=False, expand=True)
    for name in ("reward", "advantage", "age"):
        table.add_column(name, justify="right", style="bold", no_wrap=True)
    table.add_column("half", no_wrap=True)
    table.add_column("completion", ratio=1)
    for row in rows:
        table.add_row(
            _said(row.get("reward")),
            _said(row.get("advantage")),
            str(row.get("age", "")),
            Text("replayed", style="yellow") if row.get("replayed") else Text("fresh"),
            _coloured(row),
        )
    answer = Text.assemble("answer ", (printable(str(first.get("answer", ""))), "bold green"))
    if first.get("hint"):
        answer.append("  hint " + printable(shortened(str(first["hint"]))), style="dim")
    facts = [f"step {step}", str(first.get("category") or first.get("type") or "")]
    facts += [f"{first['tier']} tier"] if first.get("tier") else []
    facts += ["dead group"] if first.get("dead_before") else []
    title = Text(printable(shortened(str(first.get("question", "")), 100)), style="bold")
    return Panel(
        Group(answer, table),
        title=title,
        title_align="left",
        subtitle=Text(" · ".join(printable(fact) for fact in facts if fact), style="dim"),
    )


def _said(value: float | None) -> str:
    return "masked" if value is None else f"{value:.3g}"


def _coloured(row: Sample, most: int = 600) -> Text:
    """The completion, its tokens on blue where they are pushed up and on red where down."""
    text, ends, weights = row.get("text", ""), row.get("token_ends"), row.get("weight")
    advantage = row.get("advantage")
    if not ends or not weights or not advantage:
        return Text(printable(shortened(text, most)))
    top = max((abs(weight or 0.0) for weight in weights), default=0.0) or 1.0
    found, start = Text(), 0
    for end, weight in zip(ends, weights, strict=False):
        if start > most:
            found.append(" ...", style="dim")
            break
        level = int(40 + 60 * abs(weight or 0.0) / top)
        blue = f"rgb({level // 3},{level // 2},{level})"
        colour = blue if advantage > 0 else f"rgb({level},40,40)"
        found.append(printable(text[start:end]), style=f"white on {colour}")
        start = end
    return found
