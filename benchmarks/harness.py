"""Figures of one benchmark: a line each on the screen, a flat JSON object in
build/bench/NAME.json."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from tests.small_run import RECIPE

BENCH = Path("build/bench")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--smoke",
        action="store_true",
        help="smallest sizes: whether it runs to its end, not how fast",
    )
    found.add_argument("--out", type=Path, default=BENCH, help="folder of the figures")
    return found


def smoke_recipe(folder: Path) -> Path:
    """The tests' recipe of a few clips, in ``folder``, with one actor of each kind. With one cache
    its world is made once for all."""
    recipe = yaml.safe_load(RECIPE)
    recipe["rollout"]["workers"] = recipe["learner"]["ranks"] = 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "smoke.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def spread(name: str, values: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Median, least and greatest of some values as figures."""
    yield name, statistics.median(values)
    yield f"{name}_low", min(values)
    yield f"{name}_high", max(values)


class Figures:
    """Collects ``name: number`` of one benchmark; ``write`` leaves them in ``folder``."""

    def __init__(self, name: str, folder: Path = BENCH) -> None:
        self.path = folder / f"{name}.json"
        self.values: dict[str, float] = {}
        self.add({"load_before": os.getloadavg()[0], "cores": os.cpu_count() or 0})

    def add(self, values: Mapping[str, float]) -> None:
        """Take in and print some figures. Raises ValueError for a name that is there already."""
        for name, value in values.items():
            if name in self.values:
                raise ValueError(f"figure {name!r} was reported twice: give it a name of its own")
            self.values[name] = round(float(value), 4)
            print(f"{name:32s} {self.values[name]:>14,.4f}", flush=True)

    def write(self) -> Path:
        """Write all figures, whole or not at all, and return the file."""
        self.add({"load_after": os.getloadavg()[0]})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=2) + "\n")
        temporary.replace(self.path)
        print(self.path)
        return self.path
