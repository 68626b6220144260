"""report.html and plot.png: one run, told so that a reader who was not there can judge it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from avatar_rl.cluster.telemetry.charts.intervals import wilson
from avatar_rl.cluster.telemetry.charts.panels import panels
from avatar_rl.cluster.telemetry.charts.svg import draw
from avatar_rl.cluster.telemetry.distributions import draw_distributions
from avatar_rl.cluster.telemetry.metrics import (
    CATALOGUE,
    OLD_NAMES,
    describe,
    members,
    uncatalogued,
)
from avatar_rl.cluster.telemetry.plots import draw_plot
from avatar_rl.cluster.telemetry.run_files import (
    RunStatus,
    Sample,
    read_distributions,
    read_metrics,
    read_status,
)
from avatar_rl.cluster.telemetry.screen import duration
from avatar_rl.common.files import read_jsonl, replace_text
from avatar_rl.common.types import JsonObject

if TYPE_CHECKING:
    from jinja2 import Template

Row = dict[str, float | None]
#: Pairs of held-out answers and training groups shown, and the last events listed.
SHOWN_PAIRS, SHOWN_GROUPS, SHOWN_EVENTS = 5, 2, 60
STATES = {
    "finished": "finished",
    "interrupted": "interrupted; this report covers the steps until then",
    "failed": "failed; this report covers the steps until then",
    "lost": "its process is gone; this report covers the steps until then",
}


class Ledger(TypedDict):
    """``gap``: groups unaccounted for; None where an entry is missing."""

    entries: dict[str, int]
    gap: int | None
    step: int


class AnswerPair(TypedDict):
    """Two answers to one held-out prompt and their steps; ``after`` None with one evaluation."""

    before: Sample
    after: Sample | None
    steps: tuple[int, int]


class Folded(TypedDict):
    """Completions of one half with the same text and rewards, told once."""

    row: Sample
    count: int


class SampleGroup(TypedDict):
    """Completions of one prompt in one step."""

    step: int
    rows: list[Sample]
    folded: list[Folded]


class Events(TypedDict):
    counts: list[tuple[str, int]]  # by kind
    last: list[JsonObject]


@dataclass(frozen=True)
class Change:
    """An accuracy before and after training, both in [0, 1]; ``after`` is None with a single
    evaluation."""

    name: str
    before: float
    after: float | None
    n: int | None = None  # prompts; None: an older release did not say

    @property
    def gain(self) -> float | None:
        return None if self.after is None else self.after - self.before

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """95 % intervals of before and after; empty where ``n`` is not known."""
        if not self.n:
            return []
        return [wilson(value, self.n) for value in (self.before, self.after) if value is not None]

    @property
    def is_clear(self) -> bool:
        """Whether the intervals are apart: the data say which way it went."""
        if len(self.intervals) < 2:
            return self.n is None
        (low, high), (low_after, high_after) = self.intervals
        return low_after > high or high_after < low


def write_report(run: Path) -> Path:
    """Write ``plot.png`` and the self-contained ``report.html`` into a run folder; returns the
    report's path.

    Works for finished, interrupted and running runs. DataError when the folder is not a run or its
    files are damaged."""
    rows, status = read_metrics(run), read_status(run)
    title = headline(rows)
    distributions = read_distributions(run)
    draw_plot(rows, run / "plot.png", title)
    draw_distributions(distributions, run / "distributions.png")
    whole = changes(rows, "eval/accuracy", "eval/prompts")
    page = page_template("report.html").render(
        status=status,
        state=STATES.get(
            "lost" if status.lost else status.state, f"{status.state}, still under way"
        ),
        headline=title,
        tiles=tiles(rows, status),
        sure=whole[0] if whole else None,
        charts=[draw(panel) for panel in panels(rows, distributions)],
        categories=changes(rows, "eval/accuracy/<category>", "eval/prompts/"),
        needs=changes(rows, "eval/needs/<modality>", "eval/prompts_needing/"),
        benchmarks=changes(rows, "benchmark/accuracy/<set>"),
        ledger=ledger(rows),
        timing=timing(rows),
        tiers=tier_history(rows),
        pairs=answer_pairs(run),
        groups=rollout_groups(run),
        events=events(run),
        finals=final_values(rows),
        others=uncatalogued(name for row in rows for name in row if name != "timestamp"),
        config=_text(run / "config.yaml"),
        environment=json.loads(_text(run / "environment.json") or "{}"),
    )
    replace_text(run / "report.html", page)
    return run / "report.html"


def headline(rows: Sequence[Row]) -> str:
    """The result in one line, e.g. "Held-out accuracy 0.52 to 0.74 (+0.22)"; falls back to training
    accuracy."""
    held_out = [value for row in rows if (value := row.get("eval/accuracy")) is not None]
    if len(held_out) > 1:
        return (
            f"Held-out accuracy {held_out[0]:.2f} to {held_out[-1]:.2f} "
            f"({held_out[-1] - held_out[0]:+.2f})"
        )
    if held_out:
        return f"Held-out accuracy {held_out[0]:.2f}, measured once"
    train = [value for row in rows if (value := row.get("accuracy/train")) is not None]
    if train:
        return f"Training accuracy {train[0]:.2f} to {train[-1]:.2f}; no held-out evaluation"
    return "No accuracy was measured"


def last(rows: Sequence[Row], name: str) -> float | None:
    """The newest known value of a metric."""
    return next((value for row in reversed(rows) if (value := row.get(name)) is not None), None)


def mean(rows: Sequence[Row], name: str) -> float | None:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return sum(values) / len(values) if values else None


def changes(rows: Sequence[Row], family: str, counts: str = "") -> list[Change]:
    """First and last value of every member of an evaluation family, largest gain first; of a single
    metric, its own. ``counts`` is what the number of prompts is called, a member's name behind
    it."""
    found = []
    names = {name for row in rows for name in row}
    single = {"": family} if family in names else {}
    for member, name in (members(family, names) if "<" in family else single).items():
        values = [value for row in rows if (value := row.get(name)) is not None]
        n = last(rows, counts + member) if counts else None
        if values:
            after = values[-1] if len(values) > 1 else None
            found.append(Change(member, values[0], after, None if n is None else int(n)))
    return sorted(found, key=lambda change: (-(change.gain or 0), change.name))


def tiles(rows: Sequence[Row], status: RunStatus) -> list[tuple[str, str]]:
    """The run in a few numbers: (label, value)."""
    steps = f"{status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")
    spec = (
        ("completions generated", "completions/generated", ",.0f"),
        ("tokens generated", "tokens/generated", ",.0f"),
        ("trajectories stored", "buffer/stored", ",.0f"),
    )
    values = [(label, last(rows, name), form) for label, name, form in spec]
    values.append(("versions behind, mean", mean(rows, "staleness/mean"), ".2f"))
    known = [(label, format(value, form)) for label, value, form in values if value is not None]
    return [("steps", steps), ("wall time", duration(status.updated - status.started)), *known]


def ledger(rows: Sequence[Row]) -> Ledger | None:
    """The last ledger and whether it closes: generated = trained fresh + replay only + dropped + in
    flight."""
    parts = ("trained_fresh", "replay_only", "dropped", "in_flight")
    for row in reversed(rows):
        entry = {name: row.get(f"ledger/{name}") for name in ("generated", *parts)}
        if any(value is not None for value in entry.values()):
            known = {name: int(value) for name, value in entry.items() if value is not None}
            gap = (
                known["generated"] - sum(known[part] for part in parts) if len(known) == 5 else None
            )
            return {"entries": known, "gap": gap, "step": int(row["step"] or 0)}
    return None


def timing(rows: Sequence[Row]) -> list[tuple[str, str, float, float | None]]:
    """(name, meaning, mean seconds per step, share of the step) of the time metrics."""
    whole = mean(rows, "time/step")
    table = []
    for metric in CATALOGUE:
        seconds = mean(rows, metric.name) if metric.name.startswith("time/") else None
        if seconds is not None:
            table.append((metric.name, metric.meaning, seconds, seconds / whole if whole else None))
    return table


def tier_history(rows: Sequence[Row], points: int = 6) -> list[dict[str, int]]:
    """Tier sizes at up to ``points`` steps, first and last included."""
    names = ("step", "tiers/easy", "tiers/medium", "tiers/hard")
    whole = [
        {name: int(row[name] or 0) for name in names}
        for row in rows
        if all(row.get(n) is not None for n in names)
    ]
    if len(whole) <= points:
        return whole
    return [whole[round(index * (len(whole) - 1) / (points - 1))] for index in range(points)]


def answer_pairs(run: Path) -> list[AnswerPair]:
    """Held-out answers of the first and the last evaluation to the same prompts, those that changed
    first."""
    files = sorted((run / "samples").glob("eval_*.jsonl"))
    if not files:
        return []
    steps = (_file_step(files[0]), _file_step(files[-1]))
    first = {row.get("prompt_id"): row for row in _samples(files[0])}
    final = {row.get("prompt_id"): row for row in _samples(files[-1])} if len(files) > 1 else {}
    shared = [(row, final.get(name)) for name, row in first.items() if name in final or not final]
    shared.sort(key=lambda pair: -abs(_accuracy(pair[1]) - _accuracy(pair[0])) if pair[1] else 0.0)
    return [
        {"before": before, "after": after, "steps": steps} for before, after in shared[:SHOWN_PAIRS]
    ]


def rollout_groups(run: Path) -> list[SampleGroup]:
    """Sampled training groups of the first and the last saved step, completions with every reward
    component."""
    files = sorted((run / "samples").glob("step_*.jsonl"))
    chosen = files if len(files) < 2 else [files[0], files[-1]]
    shown: list[SampleGroup] = []
    for file in chosen:
        groups = groupby(_samples(file), key=lambda row: row.get("prompt_id"))
        for _, rows in list((key, list(rows)) for key, rows in groups)[:SHOWN_GROUPS]:
            shown.append({"step": _file_step(file), "rows": rows, "folded": folded(rows)})
    return shown


def folded(rows: Sequence[Sample]) -> list[Folded]:
    """Completions that are alike in half, text and rewards, once each with their number; the first
    of each keeps its place."""
    found: dict[str, Folded] = {}
    for row in rows:
        parts = (row.get("replayed"), row.get("text"), row.get("reward"), row.get("components"))
        key = json.dumps(parts, sort_keys=True, default=str)
        found.setdefault(key, {"row": row, "count": 0})["count"] += 1
    return list(found.values())


def events(run: Path) -> Events:
    """Counts by kind and the last events."""
    rows = list(read_jsonl(run / "events.jsonl"))
    return {
        "counts": Counter(row.get("kind", "event") for row in rows).most_common(),
        "last": rows[-SHOWN_EVENTS:],
    }


def final_values(rows: Sequence[Row]) -> list[tuple[str, float, str, str]]:
    """(name, last value, unit, meaning) of every catalogued metric the run reported, in the
    catalogue's order."""
    names = {name for row in rows for name in row}
    order = {metric.name: index for index, metric in enumerate(CATALOGUE)}
    entries = [
        (name, entry, value)
        for name in names - OLD_NAMES.keys()
        if (entry := describe(name)) is not None and (value := last(rows, name)) is not None
    ]
    entries.sort(key=lambda item: (order[item[1].name], item[0]))
    return [(name, value, entry.unit, entry.meaning) for name, entry, value in entries]


def _samples(file: Path) -> list[Sample]:
    return cast(list[Sample], list(read_jsonl(file)))


def _accuracy(row: Sample) -> float:
    return float(row.get("accuracy") or 0.0)


def _file_step(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def page_template(name: str) -> Template:
    """A page of templates/, with autoescape on: completions, prompts and names of datasets are
    untrusted text."""
    import time

    from jinja2 import Environment, PackageLoader, StrictUndefined

    def local(form: str) -> Callable[[float], str]:
        return lambda seconds: time.strftime(form, time.localtime(seconds))

    environment = Environment(
        loader=PackageLoader("avatar_rl.cluster.telemetry", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clock"] = local("%H:%M:%S")
    environment.filters["date"] = local("%Y-%m-%d %H:%M")
    environment.filters["duration"] = duration
    environment.filters["score"] = lambda value: "masked" if value is None else f"{value:.3g}"
    return environment.get_template(name)
