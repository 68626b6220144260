"""From the records of the sweeps to a table, figures and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from avatar_rl.cluster.telemetry.distributions import advantage_shares, loss_by_position
from avatar_rl.cluster.telemetry.plots import BLUE, GREY, ORANGE, VERMILION
from benchmarks.studies.drawing import Drawing, draw_all
from benchmarks.studies.report import ACCURACY, COMPLETIONS, UPDATES, passage
from benchmarks.studies.sweep_arms import ARMS, BASE, SWEEPS
from benchmarks.studies.sweep_arms import COMPLETIONS as LENGTH

Record = Mapping[str, Any]
TARGETS = (0.70, 0.80)


def mean_accuracy(record: Record, length: int = LENGTH) -> float:
    """Training accuracy averaged over the first ``length`` completions: the area under its curve,
    which one lucky measurement moves less than it moves a passage."""
    xs, ys = np.array([(point[COMPLETIONS], point[ACCURACY]) for point in record["curve"]]).T
    inside = (
        xs < length
    )  # with replay the first steps generate more, so that a run ends a little later
    xs, ys = np.append(xs[inside], length), np.append(ys[inside], np.interp(length, xs, ys))
    return float(np.trapezoid(ys, xs) / (xs[-1] - xs[0]))


def by_arm(records: Sequence[Record]) -> dict[str, list[Record]]:
    """In the order of the arms."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record["arm"]].append(record)
    return {name: found[name] for name in ARMS if name in found}


def table(arms: Mapping[str, Sequence[Record]]) -> str:
    rows = [
        f"| arm | seeds | accuracy, mean over {LENGTH} completions | range | to 0.70 | to 0.80 | "
        "updates "
        "| dead, fresh | dead, mixed | held-out after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, records in arms.items():
        areas = [mean_accuracy(record) for record in records]
        passages = [median(passage(record, target) for record in records) for target in TARGETS]
        cells = [
            name,
            str(len(records)),
            f"{fmean(areas):.3f}",
            f"{min(areas):.3f} to {max(areas):.3f}",
            *(f"{value:,.0f}" if np.isfinite(value) else "not reached" for value in passages),
            f"{median(record['curve'][-1][UPDATES] for record in records):.0f}",
            f"{fmean(record['dead'] for record in records):.2f}",
            f"{fmean(record['dead_after'] for record in records):.2f}",
            f"{fmean(record['heldout'][1] for record in records):.2f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def flat(arms: Mapping[str, Sequence[Record]]) -> dict[str, float]:
    """The figures of build/bench/sweeps.json."""
    found: dict[str, float] = {"completions": float(LENGTH)}
    for name, records in arms.items():
        key = name.replace(" ", "_").replace(":", "_to_").replace(".", "p")
        found[f"seeds_{key}"] = float(len(records))
        found[f"accuracy_{key}"] = fmean(mean_accuracy(record) for record in records)
        found[f"heldout_after_{key}"] = fmean(record["heldout"][1] for record in records)
        found[f"dead_group_share_{key}"] = fmean(record["dead"] for record in records)
        shares = advantage_shares([record["distributions"] for record in records], "fresh")
        if shares is not None:
            found[f"zero_spike_{key}"] = float(shares[len(shares) // 2])
    return found


def draw(arms: Mapping[str, Sequence[Record]], folder: Path) -> list[Path]:
    """The sweeps, the histograms of advantages and the profiles of the loss; returns the files."""
    drawings = (
        Drawing("sweeps", (14, 3.6), lambda axes: _sweeps(axes, arms), len(SWEEPS)),
        Drawing("advantages", (10, 3.4), lambda axes: _advantages(axes, arms), 2, sharey=False),
        Drawing("loss_by_position", (7, 3.6), lambda axes: _profiles(axes, arms)),
    )
    return draw_all(drawings, folder)


def _sweeps(axes: Any, arms: Mapping[str, Sequence[Record]]) -> None:
    for axis, (title, entries) in zip(axes, SWEEPS.items(), strict=True):
        known = [(label, arm) for label, arm in entries if arm in arms]
        for place, (_, arm) in enumerate(known):
            values = [mean_accuracy(record) for record in arms[arm]]
            axis.scatter([place] * len(values), values, color=GREY, s=14, zorder=3)
            axis.plot(
                [place - 0.3, place + 0.3],
                [fmean(values)] * 2,
                color=ORANGE if arm == BASE else BLUE,
                linewidth=3,
            )
        axis.set_xticks(
            range(len(known)), [label for label, _ in known], rotation=20 if title[0] in "ps" else 0
        )
        axis.set(title=title)
    axes[0].set_ylabel(f"training accuracy,\nmean over {LENGTH} completions")


def _advantages(axes: Any, arms: Mapping[str, Sequence[Record]]) -> None:
    for axis, name in zip(axes, ("grpo", BASE), strict=True):
        for kind, colour in (("fresh", BLUE), ("replay", ORANGE)):
            rows = [record["distributions"] for record in arms.get(name, ())]
            if (shares := advantage_shares(rows, kind)) is not None:
                axis.stairs(
                    shares,
                    np.linspace(-4, 4, len(shares) + 1),
                    fill=True,
                    alpha=0.4,
                    color=colour,
                    label=kind,
                )
        axis.set(title=f"Advantages, {name}", xlabel="advantage", ylabel="share of completions")
        axis.legend()


def _profiles(axes: Any, arms: Mapping[str, Sequence[Record]]) -> None:
    axis = axes[0]
    for name, colour in (
        ("lambda 0", GREY),
        (BASE, BLUE),
        ("lambda 1", ORANGE),
        ("inverse_parabolic", VERMILION),
    ):
        rows = [record["distributions"] for record in arms.get(name, ())]
        if (profile := loss_by_position(rows, "fresh")) is not None:
            places = (np.arange(len(profile)) + 0.5) / len(profile)
            label = f"{name} (lambda 0.3)" if name in (BASE, "inverse_parabolic") else name
            axis.plot(
                places,
                profile / np.nanmean(profile),
                color=colour,
                marker="o",
                markersize=3,
                label=label,
            )
    axis.set(
        title="Loss of fresh tokens by position, relative to the mean",
        xlabel="position in the completion",
    )
    axis.legend()
