"""From the records of the ablations to tables, figures and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from avatar_rl.cluster.telemetry.plots import BLUE, GREY, ORANGE, VERMILION
from benchmarks.studies.ablation_arms import ARMS, COMPLETIONS, GROUPS, SOLVED
from benchmarks.studies.arms import POOL
from benchmarks.studies.drawing import Drawing, draw_all
from benchmarks.studies.report import ACCURACY
from benchmarks.studies.sweep_report import mean_accuracy

Record = Mapping[str, Any]
ByArm = Mapping[str, Sequence[Record]]
#: Student's t, two-sided 95 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
#: Where the share of solved prompts is read, of all completions.
QUARTERS = (0.25, 0.5, 0.75, 1.0)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean by Student's t; infinite for fewer than two values, and
    for more than ten."""
    n = len(values)
    if not 2 <= n <= len(_T) + 1:
        return math.inf
    return _T[n - 2] * stdev(values) / math.sqrt(n)


def area(record: Record) -> float:
    return mean_accuracy(record, COMPLETIONS)


def changes(arm: Sequence[Record], reference: Sequence[Record]) -> list[float]:
    """Per seed that both have: what ``arm`` is better by."""
    known = {record["seed"]: area(record) for record in reference}
    return [area(one) - known[one["seed"]] for one in arm if one["seed"] in known]


def solved_at(record: Record, completions: float) -> float:
    """Share of the pool that any training completion had answered right by then."""
    done = [count for at, count in record.get("solved", ()) if at <= completions]
    return (done[-1] if done else 0) / POOL.train


def tables(arms: ByArm) -> str:
    parts = [text for title, rows in GROUPS.items() if (text := _group(arms, title, rows))]
    return "\n\n".join([*parts, *([solved] if (solved := _solved(arms)) else [])])


def _group(arms: ByArm, title: str, rows: Sequence[tuple[str, str]]) -> str:
    known = [(label, name) for label, name in rows if arms.get(name)]
    if not known:
        return ""
    lines = [
        f"| {title} | seeds | accuracy, mean over {COMPLETIONS} completions | 95 % | "
        f"change to {rows[0][0]} | 95 % | at the end | held-out after | dead, fresh |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, name in known:
        records = arms[name]
        areas = [area(record) for record in records]
        moved = changes(records, arms.get(rows[0][1], ())) if name != rows[0][1] else []
        cells = [
            label,
            str(len(records)),
            f"{fmean(areas):.3f}",
            _between(areas, share=True),
            f"{fmean(moved):+.3f}{_dagger(moved)}" if moved else "",
            _between(moved) if moved else "",
            f"{fmean(record['curve'][-1][ACCURACY] for record in records):.2f}",
            f"{fmean(record['heldout'][1] for record in records):.2f}",
            f"{fmean(record['dead'] for record in records):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _solved(arms: ByArm) -> str:
    known = [name for name in SOLVED if arms.get(name)]
    if not known:
        return ""
    places = [round(COMPLETIONS * part) for part in QUARTERS]
    lines = [
        "| solved share by completions | seeds | " + " | ".join(map(str, places)) + " |",
        "|---|---|" + "---|" * len(places),
    ]
    for name in known:
        cells = []
        for place in places:
            values = [solved_at(record, place) for record in arms[name]]
            cells.append(f"{fmean(values):.2f} ({_between(values, 2, share=True)})")
        lines.append(f"| {name} | {len(arms[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _between(values: Sequence[float], digits: int = 3, *, share: bool = False) -> str:
    width = half_width(values)
    if math.isinf(width):
        return "one seed"
    low, high = fmean(values) - width, fmean(values) + width
    if share:
        low, high = max(0.0, low), min(1.0, high)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _dagger(values: Sequence[float]) -> str:
    """Marks a change whose interval holds zero, and one of fewer than three seeds: two that agree
    by luck have an interval of nothing."""
    sure = len(values) >= 3 and abs(fmean(values)) > half_width(values)
    return "" if sure else " †"


def flat(arms: ByArm) -> dict[str, float]:
    """The figures of build/bench/ablations.json."""
    found: dict[str, float] = {"completions": float(COMPLETIONS)}
    for name, records in arms.items():
        key = "".join(c if c.isalnum() else "_" for c in name.replace("+", "plus")).strip("_")
        found[f"seeds_{key}"] = float(len(records))
        found[f"accuracy_{key}"] = fmean(area(record) for record in records)
        found[f"heldout_after_{key}"] = fmean(record["heldout"][1] for record in records)
        found[f"solved_{key}"] = fmean(solved_at(record, math.inf) for record in records)
    return found


def in_order(records: Sequence[Record]) -> dict[str, list[Record]]:
    found = {name: [one for one in records if one["arm"] == name] for name in ARMS}
    return {name: runs for name, runs in found.items() if runs}


def draw(arms: ByArm, folder: Path) -> list[Path]:
    """The groups, and the solved share over time; returns the files."""
    drawings = (
        Drawing("ablations", (15, 3.8), lambda axes: _groups(axes, arms), len(GROUPS)),
        Drawing("solved_share", (7, 3.6), lambda axes: _over_time(axes, arms)),
    )
    return draw_all(drawings, folder)


def _groups(axes: Any, arms: ByArm) -> None:
    for axis, (title, rows) in zip(axes, GROUPS.items(), strict=True):
        known = [(label, name) for label, name in rows if arms.get(name)]
        for place, (_, name) in enumerate(known):
            values = [area(record) for record in arms[name]]
            axis.scatter([place] * len(values), values, color=GREY, s=14, zorder=3)
            width = half_width(values)
            axis.errorbar(
                place,
                fmean(values),
                yerr=None if math.isinf(width) else width,
                color=ORANGE if name == rows[0][1] else BLUE,
                marker="_",
                markersize=22,
                markeredgewidth=3,
                capsize=4,
            )
        axis.set_xticks(range(len(known)), [label for label, _ in known], rotation=30, ha="right")
        axis.set(title=title, xlim=(-0.6, len(known) - 0.4), ylim=(0, 1))
    axes[0].set_ylabel(f"training accuracy,\nmean over {COMPLETIONS} completions")


def _over_time(axes: Any, arms: ByArm) -> None:
    axis = axes[0]
    grid = np.arange(0, COMPLETIONS + 1, 8)
    for name, colour in zip(SOLVED, (GREY, VERMILION, BLUE), strict=True):
        if not arms.get(name):
            continue
        rows = np.array([[solved_at(record, at) for at in grid] for record in arms[name]])
        axis.plot(grid, rows.mean(axis=0), color=colour, label=f"{name} ({len(rows)})")
        axis.fill_between(
            grid, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.1, linewidth=0
        )
    axis.set(
        title="Prompts ever answered right in training: mean and range of the seeds",
        xlabel="completions generated",
        ylabel=f"share of the {POOL.train} prompts",
    )
    axis.set_ylim(0, 1.02)
    if any(arms.get(name) for name in SOLVED):
        axis.legend(loc="lower right")
