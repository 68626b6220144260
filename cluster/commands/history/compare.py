"""`avatar compare RUN RUN ...`: what differs between runs, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml

from avatar_rl.cluster.commands.history.listing import seconds_of, state_of
from avatar_rl.cluster.telemetry.run_files import RunStatus, read_metrics, read_status
from avatar_rl.cluster.telemetry.screen import duration
from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.common.plain_yaml import parse_plain
from avatar_rl.common.text import printable
from avatar_rl.common.types import JsonObject, ReadOnlyJson

#: Of the last steps, whose mean stands for a metric that moves.
LAST = 8
#: Metrics of training that are compared, with what they are called.
TRAINING = (
    ("reward/mean", "reward"),
    ("accuracy/train", "training accuracy"),
    ("kl/reference", "KL to the reference"),
    ("entropy", "entropy"),
    ("groups/dead_after", "dead groups"),
    ("completion/length_mean", "completion tokens"),
    ("time/step", "seconds per step"),
    ("rollout/tokens_per_s", "rollout tokens/s"),
    ("learner/tokens_per_s", "learner tokens/s"),
)
#: Keys that differ between any two runs and say nothing.
_SILENT = ("output.folder", "screen")


@dataclass(frozen=True)
class Run:
    """What is known of one run."""

    name: str  # of its folder
    status: RunStatus
    config: JsonObject
    rows: list[dict[str, float | None]]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises DataError for what is no run; a run without metrics has no rows."""
        status = read_status(path)
        try:
            rows = read_metrics(path)
        except DataError:
            rows = []
        try:
            config = parse_plain((path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            config = {}
        return cls(path.name, status, config if isinstance(config, dict) else {}, rows)

    def last(self, name: str) -> float | None:
        """A metric's newest value."""
        return next((v for row in reversed(self.rows) if (v := row.get(name)) is not None), None)

    def recent(self, name: str) -> float | None:
        """The mean of a metric's newest values."""
        values = [v for row in self.rows if (v := row.get(name)) is not None]
        return fmean(values[-LAST:]) if values else None

    def best(self, name: str) -> float | None:
        return max((v for row in self.rows if (v := row.get(name)) is not None), default=None)


def compare(paths: Sequence[Path], *, as_json: bool = False) -> int:
    """Print settings that differ, results and metrics side by side. Raises ConfigError for fewer
    than two runs and DataError for what is none."""
    if len(paths) < 2:
        raise ConfigError("avatar compare takes two runs or more: ids below --folder, or folders")
    runs = [Run.read(path) for path in paths]
    parts: dict[str, dict[str, list[ReadOnlyJson]]] = {
        "settings": differing([run.config for run in runs]),
        "result": _results(runs),
        "held-out accuracy by type": _by_type(runs),
        f"training, mean of the last {LAST} steps": _training(runs),
    }
    if as_json:
        print(json.dumps({"runs": [run.name for run in runs], **parts}, indent=1))
        return 0
    _print(runs, parts)
    return 0


def differing(configs: Sequence[JsonObject]) -> dict[str, list[ReadOnlyJson]]:
    """Dotted key -> its value in each configuration, where they are not all the same."""
    flat = [_flat(config) for config in configs]
    names = [name for one in flat for name in one]
    found = {}
    for name in dict.fromkeys(names):
        values = [one.get(name) for one in flat]
        if any(value != values[0] for value in values) and name not in _SILENT:
            found[name] = values
    return found


def _flat(config: Mapping[str, ReadOnlyJson], prefix: str = "") -> dict[str, ReadOnlyJson]:
    found: dict[str, ReadOnlyJson] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _results(runs: Sequence[Run]) -> dict[str, list[ReadOnlyJson]]:
    def gain(run: Run) -> float | None:
        before, now = run.status.accuracy_before, run.status.accuracy_now
        return None if before is None or now is None else now - before

    columns: tuple[tuple[str, Callable[[Run], ReadOnlyJson]], ...] = (
        ("state", lambda run: state_of(run.status)),
        ("steps", lambda run: run.status.step),
        ("held-out before", lambda run: run.status.accuracy_before),
        ("held-out now", lambda run: run.status.accuracy_now),
        ("gain", gain),
        ("best held-out", lambda run: run.best("eval/accuracy")),
        ("completions generated", lambda run: run.last("completions/generated")),
        ("tokens generated", lambda run: run.last("tokens/generated")),
        ("time", lambda run: duration(seconds_of(run.status))),
    )
    return {label: [value(run) for run in runs] for label, value in columns}


def _by_type(runs: Sequence[Run]) -> dict[str, list[ReadOnlyJson]]:
    prefix = "eval/accuracy/"
    rows = [row for run in runs for row in run.rows]
    names = sorted({name for row in rows for name in row if name.startswith(prefix)})
    return {name.removeprefix(prefix): [run.last(name) for run in runs] for name in names}


def _print(runs: Sequence[Run], parts: Mapping[str, Mapping[str, Sequence[ReadOnlyJson]]]) -> None:
    heads = [run.name for run in runs]
    table = {
        part: {label: [_shown(value) for value in values] for label, values in rows.items()}
        for part, rows in parts.items()
    }
    labels = [label for rows in table.values() for label in rows]
    first = max(map(len, labels), default=0)
    widths = [
        max([len(head), *(len(cells[at]) for rows in table.values() for cells in rows.values())])
        for at, head in enumerate(heads)
    ]
    for part, rows in table.items():
        if not rows:
            if part == "settings":
                print("the settings are the same")
            continue
        if part == next(iter(table)):
            print(_row(part, heads, first, widths))
        else:
            print(f"\n{part}")
        for label, cells in rows.items():
            print(_row(f"  {label}", cells, first, widths))


def _training(runs: Sequence[Run]) -> dict[str, list[ReadOnlyJson]]:
    found: dict[str, list[ReadOnlyJson]] = {}
    for name, label in TRAINING:
        values: list[ReadOnlyJson] = [run.recent(name) for run in runs]
        if any(value is not None for value in values):
            found[label] = values
    return found


def _row(label: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return printable(f"{label.ljust(first + 2)}  {'  '.join(padded)}".rstrip())


def _shown(value: ReadOnlyJson) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 100 else f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
