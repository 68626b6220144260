"""From the records of the sparse study to tables, figures and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

from avatar_rl.cluster.telemetry.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from benchmarks.studies.drawing import Drawing, draw_all
from benchmarks.studies.figures import step_curves
from benchmarks.studies.report import LEARNER, Study, bootstrap, passage
from benchmarks.studies.sparse_arms import ARMS, CANDIDATES, CAP, RATIOS, TARGET, TARGETS

Record = Mapping[str, Any]
#: Fewer seeds than this have no interval that means anything.
LEAST_SEEDS = 3
#: Completions between which dead groups are told.
STRETCHES = ((0, 256), (256, 512), (512, 1024), (1024, CAP))


class Ratio(NamedTuple):
    """Median completions of one arm over those of another, a censored run taken at the cap."""

    over: str
    under: str
    value: float
    low: float  # NaN below LEAST_SEEDS seeds
    high: float
    seeds: int  # of the arm that has fewer
    over_censored: bool  # its median did not get there: the ratio is at least this
    under_censored: bool  # the ratio is at most this

    @property
    def sign(self) -> str:
        if self.over_censored and self.under_censored:
            return "unknown: "
        return ">= " if self.over_censored else "<= " if self.under_censored else ""


def in_order(records: Sequence[Record]) -> Study:
    return Study(records, (*ARMS, *CANDIDATES), CAP)


def passages(study: Study, arm: str, target: float, column: int = 0) -> list[float]:
    """Of every seed, inf for one that did not get there by the cap. A crashed run counts as one
    that did not."""
    found = []
    for record in study.by_arm[arm]:
        completions = passage(record, target) if record.get("curve") else math.inf
        late = completions > CAP
        found.append(math.inf if late else passage(record, target, column))
    return found


def alike(name: str) -> list[str]:
    """The arm at every learning rate."""
    return [arm for arm in ARMS if arm.partition("@")[0] == name]


def best(study: Study, name: str) -> str | None:
    """The rate with the smallest median; ties, and rates that did not get there, by the mean of
    runs taken at twice the cap. None without runs."""

    def rank(arm: str) -> tuple[float, float]:
        values = passages(study, arm, TARGET)
        return median(values), fmean(min(value, 2.0 * CAP) for value in values)

    return min((arm for arm in alike(name) if arm in study.by_arm), key=rank, default=None)


def compare(study: Study, over: str, under: str) -> Ratio | None:
    """The best rates of two arms; None where one has no runs."""
    top, bottom = best(study, over), best(study, under)
    if top is None or bottom is None:
        return None
    seen = [passages(study, arm, TARGET) for arm in (top, bottom)]
    capped = [[min(value, CAP) for value in values] for values in seen]
    seeds = min(map(len, seen))
    low, high = bootstrap(*capped) if seeds >= LEAST_SEEDS else (math.nan, math.nan)
    censored = [math.isinf(median(values)) for values in seen]
    value = median(capped[0]) / median(capped[1])
    return Ratio(top, bottom, value, low, high, seeds, censored[0], censored[1])


def dead_over_time(records: Sequence[Record]) -> list[float | None]:
    """Share of fresh groups whose rewards are all alike, by stretch; None where no run was."""
    found: list[float | None] = []
    for first, last in STRETCHES:
        values = [
            dead
            for record in records
            for completions, dead in record.get("dead_curve", ())
            if first < completions <= last and dead is not None
        ]
        found.append(fmean(values) if values else None)
    return found


def flat(study: Study) -> dict[str, float]:
    """The figures of build/bench/study_sparse.json; what is not known is left out."""
    found: dict[str, float] = {"target": TARGET, "cap": float(CAP)}
    for name, pair in RATIOS.items():
        one = compare(study, *pair)
        if one is None or (one.over_censored and one.under_censored):
            continue
        prefix = "ratio" if name == "completions_ratio" else name
        found |= {name: one.value, f"seeds_of_{name}": float(one.seeds)}
        found[f"{name}_at_least"] = float(one.over_censored)
        found[f"{name}_at_most"] = float(one.under_censored)
        if not math.isnan(one.low):
            found |= {f"{prefix}_low": one.low, f"{prefix}_high": one.high}
    if (grpo := best(study, "grpo")) is not None:
        found["grpo_censored_share"] = fmean(map(math.isinf, passages(study, grpo, TARGET)))
    for arm in study.arms:
        key, records = arm.replace("@", "_lr_").replace("-", "m"), study.by_arm[arm]
        there = passages(study, arm, TARGET)
        whole = [one for one in records if one.get("curve")]
        found[f"seeds_{key}"] = float(len(records))
        found[f"crashed_{key}"] = float(len(records) - len(whole))
        found[f"censored_share_{key}"] = fmean(map(math.isinf, there))
        if math.isfinite(median(there)):
            found[f"completions_{key}"] = median(there)
        if whole:
            found[f"dead_group_share_{key}"] = study.mean(arm, "dead")
            found[f"heldout_after_{key}"] = fmean(one["heldout"][1] for one in whole)
    return found


def tables(study: Study) -> str:
    return "\n\n".join((_ratios(study), _arms(study), _dead(study)))


def _ratios(study: Study) -> str:
    rows = ["| ratio of completions | value | 95 % interval | seeds |", "|---|---|---|---|"]
    for name, pair in RATIOS.items():
        one = compare(study, *pair)
        if one is None:
            continue
        spread = f"fewer than {LEAST_SEEDS} seeds"
        if not math.isnan(one.low):
            spread = f"{one.low:.2f} to {one.high:.2f}"
        value = "unknown" if one.sign.startswith("unknown") else f"{one.sign}{one.value:.2f}"
        rows.append(f"| `{name}`: {one.over} / {one.under} | {value} | {spread} | {one.seeds} |")
    return "\n".join(rows)


def _arms(study: Study) -> str:
    heads = " | ".join(f"to {target:.2f}" for target in TARGETS)
    rows = [
        f"| arm | seeds | {heads} | each seed to {TARGET:.2f} | censored | learner s | hinted "
        "visits | best accuracy | held-out before | after |",
        "|---|---|" + "---|" * (len(TARGETS) + 7),
    ]
    for arm in study.arms:
        whole = [one for one in study.by_arm[arm] if one.get("curve")]
        there = passages(study, arm, TARGET)
        middles = " | ".join(_number(median(passages(study, arm, t))) for t in TARGETS)
        late = sum(map(math.isinf, there))
        cells = [
            arm,
            str(len(there)),
            middles,
            ", ".join(_number(value) for value in there),
            f"{late} of {len(there)}",
            _number(median(passages(study, arm, TARGET, LEARNER))),
        ]
        if whole:
            cells += [
                f"{fmean(one['hinted'] for one in whole):.0f}",
                f"{fmean(max(point[-1] for point in one['curve']) for one in whole):.2f}",
                *(f"{fmean(one['heldout'][end] for one in whole):.2f}" for end in (0, 1)),
            ]
        else:
            cells += ["crashed"] * 4
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _dead(study: Study) -> str:
    heads = " | ".join(f"{first:,} to {last:,}" for first, last in STRETCHES)
    rows = [
        f"| dead fresh groups by completions | {heads} |",
        "|---|" + "---|" * len(STRETCHES),
    ]
    for arm in study.arms:
        shares = dead_over_time(study.by_arm[arm])
        cells = ["" if share is None else f"{share:.2f}" for share in shares]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _number(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:,.0f}"


COLOURS = (VERMILION, BLUE, SKY, "#003f5c", GREEN, PURPLE, ORANGE, GREY, "#b5a300", "#7f4f24")


def draw(study: Study, folder: Path) -> list[Path]:
    """Accuracy and dead groups over completions; returns the files."""
    shown = [arm for arm in study.arms if any(one.get("curve") for one in study.by_arm[arm])]
    if not shown:
        return []
    return draw_all(
        (
            Drawing("sparse_efficiency", (8, 4.6), lambda axes: _accuracy(axes[0], study, shown)),
            Drawing("sparse_dead_groups", (8, 3.8), lambda axes: _over_time(axes[0], study, shown)),
        ),
        folder,
    )


def _style(row: int) -> dict[str, Any]:
    return {"color": COLOURS[row % len(COLOURS)], "linestyle": ("-", "--")[row // len(COLOURS) % 2]}


def _accuracy(axis: Any, study: Study, arms: Sequence[str]) -> None:
    for row, arm in enumerate(arms):
        records = [one for one in study.by_arm[arm] if one.get("curve")]
        longest = min(CAP, max(one["curve"][-1][0] for one in records))
        grid = np.arange(0, longest + 1, 16)
        curves = step_curves(records, grid.tolist())
        label = f"{arm} ({len(records)})"
        axis.plot(grid, np.median(curves, axis=0), label=label, **_style(row))
    axis.axhline(TARGET, color=GREY, linewidth=0.6)
    axis.set(
        title="Accuracy over the pool of rare successes: median of the seeds",
        xlabel="completions generated",
        ylim=(0, 1),
    )
    axis.legend(ncols=2, loc="lower right", fontsize=7)


def _over_time(axis: Any, study: Study, arms: Sequence[str]) -> None:
    """Fresh groups without signal, mean over the seeds that still run, 128 completions a bin."""
    for row, arm in enumerate(arms):
        points = [point for one in study.by_arm[arm] for point in one.get("dead_curve", ())]
        bins = np.array([int(completions // 128) for completions, _ in points])
        dead = np.array([value for _, value in points], dtype=float)
        known = sorted(set(bins.tolist()))
        ys = [float(np.nanmean(dead[bins == at])) for at in known]
        axis.plot([128 * at for at in known], ys, label=arm, **_style(row))
    axis.set(
        title="Groups without signal among the fresh ones",
        xlabel="completions generated",
        ylim=(0, 1.02),
    )
    axis.legend(ncols=2, fontsize=7)
