"""From the records of the length study to tables, figures and numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from avatar_rl.cluster.telemetry.distributions import loss_by_position
from avatar_rl.cluster.telemetry.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from avatar_rl.prompts.synthetic.world import first_taught
from avatar_rl.rewards.judges.rule_judge import RuleJudge
from benchmarks.studies.ablation_report import half_width
from benchmarks.studies.drawing import Drawing, draw_all
from benchmarks.studies.length_arms import CELLS, COMPLETIONS, SHAPES, UNIFORM, WORLD
from benchmarks.studies.length_notes import PASSES, Fault, with_reasoning
from benchmarks.studies.report import ACCURACY, TOKENS
from benchmarks.studies.report import COMPLETIONS as GENERATED
from benchmarks.studies.sweep_report import mean_accuracy

Record = Mapping[str, Any]
ByArm = Mapping[str, Sequence[Record]]
COLOURS = dict(zip(SHAPES, (BLUE, GREY, VERMILION, ORANGE, GREEN, PURPLE, SKY), strict=True))
#: Prompts over which the judge's criteria are averaged.
JUDGED = 120


def in_order(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By arm, in the order of the protocol."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record["arm"]].append(record)
    return {name: found[name] for name in CELLS if name in found}


def area(record: Record) -> float:
    return mean_accuracy(record, COMPLETIONS)


def gains(arms: ByArm, length: str, shape: str) -> list[float]:
    """Per seed that both have, what a shape's mean accuracy is above that of equal weights."""
    known = {one["seed"]: area(one) for one in arms.get(f"{length}, {UNIFORM}", ())}
    runs = arms.get(f"{length}, {shape}", ())
    return [area(one) - known[one["seed"]] for one in runs if one["seed"] in known]


def tokens(record: Record) -> float:
    """Mean tokens of a completion, over the whole run."""
    last = record["curve"][-1]
    return float(last[TOKENS] / last[GENERATED]) if last[GENERATED] else math.nan


def tables(arms: ByArm) -> str:
    lines = [
        f"| length | weights | seeds | tokens | start | accuracy, mean over {COMPLETIONS} "
        "completions | gain over equal weights | 95 % | at the end | held-out after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for length in PASSES:
        for shape in SHAPES:
            if records := arms.get(f"{length}, {shape}"):
                lines.append("| " + " | ".join(_cells(arms, records, length, shape)) + " |")
    return "\n\n".join(["\n".join(lines), judged_table()])


def _cells(arms: ByArm, records: Sequence[Record], length: str, shape: str) -> list[str]:
    moved = gains(arms, length, shape) if shape != UNIFORM else []
    width = half_width(moved)
    between = f"{fmean(moved) - width:+.3f} to {fmean(moved) + width:+.3f}" if moved else ""
    return [
        length,
        shape,
        str(len(records)),
        f"{fmean(tokens(one) for one in records):.0f}",
        f"{fmean(one['curve'][0][ACCURACY] for one in records):.2f}",
        f"{fmean(area(one) for one in records):.3f}",
        f"{fmean(moved):+.3f}" if moved else "",
        between if math.isfinite(width) else "one seed" if moved else "",
        f"{fmean(one['curve'][-1][ACCURACY] for one in records):.2f}",
        f"{fmean(one['heldout'][1] for one in records):.2f}",
    ]


@cache
def judged() -> dict[tuple[str, Fault], float]:
    """Mean of the rule judge's four criteria over reasoning of each length, honest and with each
    fault (docs/method.md 1.5)."""
    judge, found = RuleJudge(), {}
    prompts = [row.prompt for row in first_taught(WORLD, JUDGED)]
    rows = [prompt.model_dump(mode="json") for prompt in prompts]
    for length in PASSES:
        for fault in Fault:
            marks = []
            for number, prompt in enumerate(prompts):
                others = [row for row in rows if row["category"] == prompt.category]
                other = others[(number * 7 + 1) % len(others)]
                made = with_reasoning(rows[number], other, length, fault)
                verdict = judge.score(prompt, str(made["reasoning"]), str(made["answer"]))
                marks.append(fmean(verdict.values()))
            found[length, fault] = fmean(marks)
    return found


def judged_table() -> str:
    marks = judged()
    lines = [
        "| rule judge, mean of its four criteria | " + " | ".join(_FAULTS[f] for f in Fault) + " |",
        "|---|" + "---|" * len(Fault),
    ]
    for length in PASSES:
        cells = " | ".join(f"{marks[length, fault]:.2f}" for fault in Fault)
        lines.append(f"| {length} | {cells} |")
    return "\n".join(lines)


_FAULTS = {
    Fault.NONE: "honest",
    Fault.PLAN: "wrong plan",
    Fault.EVIDENCE: "notes of another clip",
    Fault.CONCLUSION: "guessed conclusion",
}


def flat(arms: ByArm) -> dict[str, float]:
    """The figures of build/bench/length.json."""
    found: dict[str, float] = {"completions": float(COMPLETIONS)}
    for (length, fault), mark in judged().items():
        found[f"judge_{length}_{fault.value}"] = mark
    for length in PASSES:
        means: dict[str, float] = {}
        for shape in SHAPES:
            records = arms.get(f"{length}, {shape}")
            if not records:
                continue
            name = f"{length}_{shape.replace(' ', '_').replace('.', 'p')}"
            means[shape] = fmean(area(one) for one in records)
            if math.isfinite(mean := fmean(tokens(one) for one in records)):
                found[f"tokens_{name}"] = mean
            found |= {
                f"seeds_{name}": float(len(records)),
                f"accuracy_{name}": means[shape],
                f"heldout_after_{name}": fmean(one["heldout"][1] for one in records),
            }
            moved = gains(arms, length, shape) if shape != UNIFORM else []
            if moved:
                found[f"gain_{name}"] = fmean(moved)
                if math.isfinite(width := half_width(moved)):
                    found[f"gain_{name}_low"] = fmean(moved) - width
                    found[f"gain_{name}_high"] = fmean(moved) + width
        if means:
            found[f"best_lambda_{length}"] = SHAPES[max(means, key=lambda shape: means[shape])][1]
    return found


def draw(arms: ByArm, folder: Path) -> list[Path]:
    """Gains by length, and where in the completions the loss lies; returns the files."""
    drawings = (
        Drawing("length_gain", (8, 4), lambda axes: _gains(axes[0], arms)),
        Drawing("length_loss", (12, 3.4), lambda axes: _losses(axes, arms), len(PASSES)),
    )
    return draw_all(drawings, folder)


def _gains(axis: Any, arms: ByArm) -> None:
    shapes = [shape for shape in SHAPES if shape != UNIFORM]
    for place, length in enumerate(PASSES):
        for offset, shape in enumerate(shapes):
            values = gains(arms, length, shape)
            at = place + (offset - (len(shapes) - 1) / 2) * 0.12
            if values:
                axis.plot(at, fmean(values), "o", color=COLOURS[shape], zorder=3)
                axis.plot([at] * len(values), values, "_", color=COLOURS[shape], markersize=8)
    for shape in shapes:
        if any(gains(arms, length, shape) for length in PASSES):
            axis.plot([], [], "o", color=COLOURS[shape], label=shape)
    axis.axhline(0, color=GREY, linewidth=1)
    axis.set_xticks(range(len(PASSES)), [f"{name}" for name in PASSES])
    axis.set(
        title="Gain of shaped weights over equal ones: mean and every seed",
        xlabel="length of the reasoning",
        ylabel=f"training accuracy,\nmean over {COMPLETIONS} completions",
    )
    if axis.get_legend_handles_labels()[0]:
        axis.legend(ncols=2)


def _losses(axes: Any, arms: ByArm) -> None:
    for axis, length in zip(axes, PASSES, strict=True):
        for shape in (UNIFORM, "parabolic 0.3", "inverse 0.3"):
            rows = [record["distributions"] for record in arms.get(f"{length}, {shape}", ())]
            if (profile := loss_by_position(rows, "fresh")) is not None:
                places = (np.arange(len(profile)) + 0.5) / len(profile)
                axis.plot(places, profile / np.nanmean(profile), color=COLOURS[shape], label=shape)
        axis.set(title=f"Loss by position, {length}", xlabel="position in the completion")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
