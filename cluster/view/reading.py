"""A run's files as they are found: being written, torn, of an older release, or of another
program. What cannot be read is left out and said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from avatar_rl.cluster.telemetry.metrics import OLD_NAMES, describe
from avatar_rl.cluster.telemetry.run_files import RunStatus, read_status
from avatar_rl.common.errors import DataError
from avatar_rl.common.plain_yaml import parse_plain
from avatar_rl.common.types import Json, JsonObject

#: Points of a curve that are sent; a longer run is thinned evenly.
CURVE_POINTS, SPARK_POINTS = 600, 60
#: The curve of the list of runs, whichever a run has first.
HEADLINES = ("eval/accuracy", "accuracy/moving", "accuracy/train", "reward/mean")
SHOWN_EVENTS = 200
#: Of each file, the faults that are told one by one.
SHOWN_FAULTS = 5


@dataclass
class Faults:
    """What of a run could not be read, in words."""

    said: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, file: Path, what: str) -> None:
        self.counts[file.name] += 1
        if self.counts[file.name] <= SHOWN_FAULTS:
            self.said.append(f"{file.parent.name}/{file.name}: {what}")
        elif self.counts[file.name] == SHOWN_FAULTS + 1:
            self.said.append(f"{file.parent.name}/{file.name}: and more of the kind")


def read_rows(file: Path, faults: Faults) -> Iterator[JsonObject]:
    """Objects of a JSONL file. A last line without its end is being written; any other line that is
    no object is left out and said."""
    for number, line in lines_of(file, faults):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(file, f"line {number} is not JSON and left out ({error})")
            continue
        if isinstance(row, dict):
            yield row
        else:
            faults.add(file, f"line {number} is no object and left out")


def lines_of(file: Path, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file with their numbers from 1; none where it is missing."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        faults.add(file, f"cannot be read ({error.strerror})")
        return
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if number == len(lines) and not _is_whole(line):
            return
        yield number, line


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def list_statuses(folder: Path) -> tuple[list[tuple[str, RunStatus]], list[str]]:
    """(folder name, status) of the runs below ``folder``, newest first, and what is wrong with
    those that are left out."""
    found, damaged = [], []
    for file in sorted(folder.glob("*/status.json")):
        try:
            found.append((file.parent.name, read_status(file.parent)))
        except DataError as error:
            damaged.append(str(error))
    return sorted(found, key=lambda pair: pair[1].started, reverse=True), damaged


def metrics_of(run: Path, faults: Faults) -> list[JsonObject]:
    """A row per step in order; of rows of one step later values win."""
    steps: dict[int, JsonObject] = {}
    for row in read_rows(run / "metrics.jsonl", faults):
        step = row.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            steps.setdefault(step, {}).update(row)
        else:
            faults.add(run / "metrics.jsonl", "a row without a step is left out")
    return [steps[step] for step in sorted(steps)]


def columns(rows: Sequence[JsonObject]) -> JsonObject:
    """Curves: the steps, and by name the values, null where there is none."""
    names = sorted(
        {name for row in rows for name in row} - {"step", "timestamp"} - OLD_NAMES.keys()
    )
    kept: dict[str, Json] = {}
    for name in names:
        points = [
            [row["step"], _rounded(value)]
            for row in rows
            if isinstance(value := row.get(name), int | float) and not isinstance(value, bool)
        ]
        kept[name] = thinned(points, CURVE_POINTS)
    meanings: dict[str, Json] = {
        name: {"unit": entry.unit, "meaning": entry.meaning}
        for name in names
        if (entry := describe(name)) is not None
    }
    return {"curves": kept, "meanings": meanings}


def thinned(points: Sequence[Json], most: int) -> list[Json]:
    """At most ``most`` of the points, first and last included."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def headline_of(rows: Sequence[JsonObject]) -> JsonObject:
    """The curve of the list of runs: its metric and (step, value) points."""
    found: Mapping[str, Json] = columns(rows)["curves"]  # type: ignore[assignment]
    for name in HEADLINES:
        points = found.get(name)
        if isinstance(points, list) and len(points) > 1:
            return {"name": name, "points": thinned(points, SPARK_POINTS)}
    return {"name": "", "points": []}


def events_of(run: Path, faults: Faults) -> JsonObject:
    """Counts by kind, and the last events, newest last."""
    rows = list(read_rows(run / "events.jsonl", faults))
    counts = Counter(str(row.get("kind", "event")) for row in rows)
    return {"counts": dict(counts.most_common()), "last": list(rows[-SHOWN_EVENTS:])}


def quarantined(run: Path, faults: Faults) -> set[str]:
    """Prompts that were set aside, as the events name them."""
    return {
        str(row.get("message", "")).partition(": ")[0]
        for row in read_rows(run / "events.jsonl", faults)
        if row.get("kind") == "prompt quarantined"
    }


def config_of(run: Path, faults: Faults) -> dict[str, Json]:
    """The resolved recipe as dotted keys."""
    file = run / "config.yaml"
    try:
        raw = parse_plain(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        faults.add(file, f"cannot be read ({str(error).splitlines()[0]})")
        return {}
    return dict(_flat(raw, ""))


def _flat(value: Json, name: str) -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif name:
        plain = value is None or isinstance(value, str | int | float | bool)
        yield name, value if plain else json.dumps(value, default=str)
