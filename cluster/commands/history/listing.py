"""`avatar runs list`: a line per run, or JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from avatar_rl.cluster.telemetry.run_files import ENDED, RunStatus, list_runs
from avatar_rl.cluster.telemetry.screen import duration
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.text import printable
from avatar_rl.common.types import ReadOnlyJson

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """``key`` sorts, ``show`` prints; ``width`` is the least."""

    title: str
    key: Callable[[RunStatus], Value]
    show: Callable[[RunStatus], str]
    right: bool = False


def state_of(status: RunStatus) -> str:
    return "lost" if status.lost else status.state


def seconds_of(status: RunStatus) -> float:
    """How long it ran, or has been running."""
    over = status.state in ENDED or status.lost
    return (status.updated if over else time.time()) - status.started


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _gain(status: RunStatus) -> float | None:
    if status.accuracy_before is None or status.accuracy_now is None:
        return None
    return status.accuracy_now - status.accuracy_before


def _phase(status: RunStatus) -> str:
    """What it does now; of a run that is over, nothing."""
    return "" if status.state in ENDED or status.lost else status.phase


COLUMNS = {
    "run": Column("run", lambda s: s.run_id, lambda s: s.run_id),
    "state": Column("state", state_of, state_of),
    "phase": Column("phase", _phase, _phase),
    "step": Column(
        "step", lambda s: s.step, lambda s: f"{s.step}/{s.total_steps or '-'}", right=True
    ),
    "before": Column("before", lambda s: s.accuracy_before, lambda s: _share(s.accuracy_before)),
    "now": Column("now", lambda s: s.accuracy_now, lambda s: _share(s.accuracy_now)),
    "gain": Column(
        "gain", _gain, lambda s: "-" if (gain := _gain(s)) is None else f"{gain:+.3f}", right=True
    ),
    "reward": Column("reward", lambda s: s.reward, lambda s: _share(s.reward)),
    "started": Column(
        "started",
        lambda s: s.started,
        lambda s: time.strftime("%Y-%m-%d %H:%M", time.localtime(s.started)),
    ),
    "took": Column("took", seconds_of, lambda s: duration(seconds_of(s)), right=True),
    "host": Column("host", lambda s: s.host, lambda s: s.host),
    "error": Column("error", lambda s: s.error or "", lambda s: (s.error or "")[:60]),
}
SHOWN = ("run", "state", "phase", "step", "before", "now", "gain", "took")


def show(
    parent: Path,
    *,
    sort: str = "started",
    reverse: bool = False,
    columns: Sequence[str] = SHOWN,
    as_json: bool = False,
) -> int:
    """Print the runs below ``parent``, newest first or in the order of a column, unknown values
    last.

    Raises ConfigError for a column that there is not."""
    for name in (sort, *columns):
        if name not in COLUMNS:
            raise ConfigError(f"runs have no column {name!r}: choose of {', '.join(COLUMNS)}")
    damaged: list[str] = []
    found = list_runs(parent, damaged.append)
    if sort != "started":
        found.sort(key=lambda status: _sortable(COLUMNS[sort].key(status)))
    if reverse:
        found.reverse()
    if as_json:
        print(json.dumps([_as_json(status) for status in found], indent=1))
        return 0
    if not found and not damaged:
        print(f"there are no runs below {parent} (--folder says where to look)")
    _print_table(found, [COLUMNS[name] for name in columns])
    for message in damaged:
        print(printable(message))
    return 0


def _print_table(found: Sequence[RunStatus], columns: Sequence[Column]) -> None:
    if not found:
        return
    rows = [[printable(column.show(status)) for column in columns] for status in found]
    titles = [column.title for column in columns]
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    shown = [
        column for column, cells in zip(columns, zip(*rows, strict=True), strict=True) if any(cells)
    ]
    for cells in (titles, *rows):
        line = "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
            if column in shown
        )
        print(line.rstrip())


def _sortable(value: Value) -> tuple[bool, str, float]:
    """Numbers from large to small, texts from a to z, unknown ones last."""
    if isinstance(value, str):
        return (not value, value, 0.0)
    return (value is None, "", -float(value or 0))


def _as_json(status: RunStatus) -> dict[str, ReadOnlyJson]:
    return {
        **status.model_dump(mode="json"),
        "state": state_of(status),
        "seconds": round(seconds_of(status), 1),
    }
