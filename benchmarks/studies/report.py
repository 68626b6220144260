"""From the records of a study to numbers, figures and the tables of docs/science.md."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.harness import Figures
from benchmarks.studies.arms import ARMS, CANDIDATES, CAP, GRPO_ARMS, RATIOS, TARGET, TARGETS
from benchmarks.studies.figures import draw_figures

DOCUMENT = Path("docs/science.md")
RESAMPLES = 10_000

Record = Mapping[str, Any]
COMPLETIONS, TOKENS, WALL, LEARNER, UPDATES, ACCURACY = range(6)  # columns of a record's curve


def passage(record: Record, target: float, column: int = COMPLETIONS) -> float:
    """What ``column`` of the curve had come to at the first measurement of at least ``target``; inf
    without one."""
    return next((point[column] for point in record["curve"] if point[ACCURACY] >= target), math.inf)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Ratio of the medians of two arms' passages. Censored runs count as later than any other; NaN
    when both medians are censored."""
    top, bottom = median(over), median(under)
    if math.isinf(bottom):
        return math.nan if math.isinf(top) else 0.0
    return top / bottom


def bootstrap(over: Sequence[float], under: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of ``ratio``, the seeds of each arm resampled on their own (they
    share nothing but the prompt order). NaN resamples are left out; an infinite bound means that it
    is not known."""
    generator = np.random.default_rng(seed)
    draws = [
        ratio(
            generator.choice(over, len(over)).tolist(), generator.choice(under, len(under)).tolist()
        )
        for _ in range(RESAMPLES)
    ]
    known = sorted(value for value in draws if not math.isnan(value))
    if not known:
        return math.nan, math.nan
    return known[int(0.025 * (len(known) - 1))], known[round(0.975 * (len(known) - 1))]


class Study:
    """The records by arm; ``order``: of the arms."""

    def __init__(
        self,
        records: Sequence[Record],
        order: Sequence[str] = (*ARMS, *CANDIDATES),
        cap: float = CAP,
    ) -> None:
        self.order, self.cap = order, cap
        self.by_arm: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            self.by_arm[record["arm"]].append(record)

    @property
    def arms(self) -> list[str]:
        """In the order of the study."""
        return [name for name in self.order if name in self.by_arm]

    def passages(self, arm: str, target: float, column: int = COMPLETIONS) -> list[float]:
        return [passage(record, target, column) for record in self.by_arm[arm]]

    def best(self, arms: Sequence[str], target: float) -> str | None:
        """The arm with the smallest median passage, ties by the mean over runs capped at the cap;
        None without runs."""
        known = [name for name in arms if name in self.by_arm]
        return min(known, key=lambda name: self._rank(name, target), default=None)

    def _rank(self, name: str, target: float) -> tuple[float, float]:
        passages = self.passages(name, target)
        return median(passages), fmean(min(value, 2.0 * self.cap) for value in passages)

    def mean(self, arm: str, name: str) -> float:
        values = [record[name] for record in self.by_arm[arm] if record.get(name) is not None]
        return fmean(values) if values else math.nan

    def compare(
        self, over: str, under: str, target: float, column: int = COMPLETIONS
    ) -> tuple[float, float, float]:
        """Ratio and its interval."""
        top, bottom = self.passages(over, target, column), self.passages(under, target, column)
        return ratio(top, bottom), *bootstrap(top, bottom)


def write_report(records: Sequence[Record], figures: Figures, *, publish: bool) -> None:
    """Print the tables and write the figures; with ``publish`` also docs/science.md and its
    figures."""
    study = Study(records)
    tables = "\n\n".join(
        part for part in (headline(study), arms_table(study), cost_table(study)) if part
    )
    print(tables)
    figures.add(flat(study))
    figures.write()
    images = DOCUMENT.parent / "figures" if publish else figures.path.parent / "study"
    print(*draw_figures(study.by_arm, study.arms, images), sep="\n")
    if publish:
        insert(DOCUMENT, tables)


def flat(study: Study) -> dict[str, float]:
    """The figures of build/bench/study.json; what is not known (no runs, or censored) is left
    out."""
    best = study.best(GRPO_ARMS, TARGET)
    found: dict[str, float] = {"target": TARGET, "cap": float(CAP)}
    for name, (over, under) in RATIOS.items():
        top = best if over == "grpo" else study.best(_alike(over), TARGET)
        bottom = study.best(_alike(under), TARGET)
        if top is None or bottom is None:
            continue
        values = study.compare(top, bottom, TARGET)
        prefix = "ratio" if name == "completions_ratio" else name
        labels = (name, f"{prefix}_low", f"{prefix}_high")
        found |= {
            label: value
            for label, value in zip(labels, values, strict=True)
            if math.isfinite(value)
        }
    for arm in study.arms:
        key = arm.replace("@", "_lr_").replace("-", "m")
        found[f"seeds_{key}"] = float(len(study.by_arm[arm]))
        found[f"dead_group_share_{key}"] = study.mean(arm, "dead")
        found[f"heldout_after_{key}"] = fmean(record["heldout"][1] for record in study.by_arm[arm])
        found[f"reached_{key}"] = fmean(
            math.isfinite(value) for value in study.passages(arm, TARGET)
        )
        middle = median(study.passages(arm, TARGET))
        if math.isfinite(middle):
            found[f"completions_{key}"] = middle
    return found


def _alike(arm: str) -> list[str]:
    """The arm at every learning rate."""
    return [name for name in ARMS if name == arm or name.startswith(f"{arm}@")]


def headline(study: Study) -> str:
    rows = ["| ratio of completions | value | 95 % interval |", "|---|---|---|"]
    best = study.best(GRPO_ARMS, TARGET)
    for name, (over, under) in RATIOS.items():
        top = best if over == "grpo" else study.best(_alike(over), TARGET)
        bottom = study.best(_alike(under), TARGET)
        if top is None or bottom is None:
            continue
        value, low, high = study.compare(top, bottom, TARGET)
        rows.append(
            f"| `{name}`: {top} / {bottom} | {_number(value, 2)} | {_number(low, 2)} to "
            f"{_number(high, 2)} |"
        )
    return "\n".join(rows)


def arms_table(study: Study) -> str:
    """Per arm the median completions to each target, and what became of it."""
    targets = " | ".join(f"to {target:.2f}" for target in TARGETS)
    rows = [
        f"| arm | seeds | {targets} | range to {TARGET:.2f} | dead, fresh | dead, mixed | "
        "held-out before | after |",
        "|---|---|" + "---|" * (len(TARGETS) + 5),
    ]
    for arm in study.arms:
        records, at_target = study.by_arm[arm], study.passages(arm, TARGET)
        medians = " | ".join(_number(median(study.passages(arm, target)), 0) for target in TARGETS)
        held = [fmean(record["heldout"][end] for record in records) for end in (0, 1)]
        spread = f"{_number(min(at_target), 0)} to {_number(max(at_target), 0)}"
        rows.append(
            f"| {arm} | {len(records)} | {medians} | {spread} | {study.mean(arm, 'dead'):.2f} "
            f"| {study.mean(arm, 'dead_after'):.2f} | {held[0]:.2f} | {held[1]:.2f} |"
        )
    return "\n".join(rows)


def cost_table(study: Study) -> str:
    """The same passage in other currencies."""
    rows = [
        f"| arm, to {TARGET:.2f} | completions | tokens generated | updates | learner s | "
        "training s |",
        "|---|" * 6,
    ]
    rows[1] = "|---|---|---|---|---|---|"
    columns = ((COMPLETIONS, 0), (TOKENS, 0), (UPDATES, 0), (LEARNER, 1), (WALL, 1))
    for arm in study.arms:
        cells = [
            _number(median(study.passages(arm, TARGET, column)), digits)
            for column, digits in columns
        ]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "unknown"
    return "not reached" if math.isinf(value) else f"{value:,.{digits}f}"


def insert(document: Path, text: str, name: str = "study") -> None:
    """Replace what stands between the markers ``<!-- name: begin -->`` and ``end``. ValueError when
    there are none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = document.read_text()
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"{document} needs one {begin!r} and one {end!r}")
    head, rest = whole.split(begin)
    document.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")
