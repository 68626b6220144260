"""Figures of the study (PNG)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rl.cluster.telemetry.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
)
from benchmarks.studies.drawing import Drawing, draw_all

COLOURS = (BLUE, SKY, "#003f5c", GREY, "#b5a300", ORANGE, PURPLE, GREEN, VERMILION)
Records = Mapping[str, Sequence[Mapping[str, Any]]]


def draw_figures(by_arm: Records, arms: Sequence[str], folder: Path) -> list[Path]:
    """Sample efficiency, dead groups and tiers of every arm; returns the files."""
    colours = dict(zip(arms, [COLOURS[i % len(COLOURS)] for i in range(len(arms))], strict=True))

    def on_first(paint: Callable[..., None]) -> Callable[[Any], None]:
        return lambda axes: paint(axes[0], by_arm, arms, colours)

    drawings = (
        Drawing("sample_efficiency", (8, 4.6), on_first(_efficiency)),
        Drawing("dead_groups", (8, 3.8), on_first(_dead)),
        Drawing("tiers", (8, 3.2), on_first(_tiers)),
    )
    return draw_all(drawings, folder)


def step_curves(records: Sequence[Mapping[str, Any]], grid: Sequence[float]) -> np.ndarray:
    """(records, grid) accuracy last measured at up to so many completions, a stopped run keeping
    its last; the start of a curve counts from its first measurement."""
    rows = []
    for record in records:
        xs, ys = [point[0] for point in record["curve"]], [point[-1] for point in record["curve"]]
        at = np.maximum(np.searchsorted(xs, grid, side="right") - 1, 0)
        rows.append(np.array(ys)[at])
    return np.array(rows)


def _efficiency(
    axis: Any, by_arm: Records, arms: Sequence[str], colours: Mapping[str, str]
) -> None:
    for arm in arms:
        records = by_arm[arm]
        longest = max(record["curve"][-1][0] for record in records)
        grid = np.arange(0, longest + 1, 8)
        curves = step_curves(records, grid.tolist())
        axis.plot(
            grid, np.median(curves, axis=0), color=colours[arm], label=f"{arm} ({len(records)})"
        )
        axis.fill_between(
            grid,
            curves.min(axis=0),
            curves.max(axis=0),
            color=colours[arm],
            alpha=0.08,
            linewidth=0,
        )
    axis.set(
        title="Accuracy over the training prompts: median and range of the seeds",
        xlabel="completions generated",
    )
    axis.set_ylim(0.3, 1.0)
    axis.legend(ncols=2, loc="lower right")


def _dead(axis: Any, by_arm: Records, arms: Sequence[str], colours: Mapping[str, str]) -> None:
    for row, arm in enumerate(arms):
        for offset, name, alpha in ((-0.2, "dead", 1.0), (0.2, "dead_after", 0.45)):
            values = [record[name] for record in by_arm[arm] if record.get(name) is not None]
            if values:
                axis.barh(
                    row + offset, np.mean(values), height=0.38, color=colours[arm], alpha=alpha
                )
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set(
        title="Groups without signal: fresh alone (dark), as trained (light)",
        xlim=(0, 1),
        xlabel="share of groups",
    )


def _tiers(axis: Any, by_arm: Records, arms: Sequence[str], colours: Mapping[str, str]) -> None:
    """Tiers of the first seed of the paper's rule, the last arm with replay if it is not there."""
    mixed = [arm for arm in arms if arm.startswith("avatar")]
    if not mixed:
        return
    record = by_arm[mixed[0]][0]
    hard, medium, easy = np.array(record["tiers"]).T
    steps = np.arange(1, len(hard) + 1)
    axis.stackplot(
        steps,
        hard,
        medium,
        easy,
        labels=("Hard", "Medium", "Easy"),
        colors=(PURPLE, ORANGE, GREEN),
        alpha=0.8,
    )
    axis.set(
        title=f"Stored trajectories by tier: {mixed[0]}, seed {record['seed']}",
        xlabel="step",
        ylabel="trajectories",
    )
    axis.margins(x=0)
    axis.legend(loc="upper left")
