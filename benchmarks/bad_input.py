"""Bad inputs and live faults -> build/bench/bad_input.json; run with ``make bench
NAME=bad_input``, about three minutes.

Each bad input is tried by the surface where people meet it. The message must hold the words that
name the input and the remedy, which stand beside it in benchmarks/bad_inputs/. docs/benchmarks.md
says how to read the figures."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from transformers.utils.logging import disable_progress_bar

from benchmarks.bad_inputs import environment, media, models, rewards, rows, runs
from benchmarks.bad_inputs.entries import BadInput, Found, tried
from benchmarks.bad_inputs.faults import FAULTS, endured
from benchmarks.harness import Figures, parser

TABLES = (runs, rows, media, rewards, models, environment)
ENTRIES: list[BadInput] = [entry for table in TABLES for entry in table.ENTRIES]
SMOKE_EVERY = 6  # of the table and of the faults
SHOWN_CHARS = 1500


def try_all(entries: list[BadInput], folder: Path) -> list[Found]:
    """Try every entry; what is not named as it should be is shown."""
    found = []
    for number, entry in enumerate(entries):
        one = tried(entry, folder / f"{entry.group}{number}")
        shutil.rmtree(folder / f"{entry.group}{number}")
        found.append(one)
        if one.outcome != "named":
            said = one.said[-SHOWN_CHARS:]
            print(
                f"{entry.group} {entry.name}: {one.outcome}; {entry.words} in: {said}",
                file=sys.stderr,
            )
    return found


def figures_of(entries: list[BadInput], found: list[Found]) -> dict[str, float]:
    """Counts by outcome and by group, and the time to the message of recipes and rows."""
    outcomes = Counter(one.outcome for one in found)
    groups = Counter(entry.group for entry in entries)
    named = Counter(
        e.group for e, one in zip(entries, found, strict=True) if one.outcome == "named"
    )
    seconds = [one.seconds for entry, one in zip(entries, found, strict=True) if entry.timed]
    typed = [
        one.seconds for e, one in zip(entries, found, strict=True) if e.name.startswith("typed_")
    ]
    return {
        "tried": len(entries),
        "named_errors": outcomes["named"],
        "unnamed": outcomes["unnamed"],
        "tracebacks": outcomes["traceback"],
        "silent": outcomes["silent"],
        **{f"tried_{group}": count for group, count in sorted(groups.items())},
        **{f"named_{group}": named[group] for group in sorted(groups)},
        "median_s": float(np.median(seconds)),
        "p95_s": float(np.quantile(seconds, 0.95)),
        "typed_s": float(np.median(typed)),
    }


def main() -> int:
    options = parser(__doc__).parse_args()
    every = SMOKE_EVERY if options.smoke else 1
    figures = Figures("bad_input", options.out)
    logging.getLogger().addHandler(logging.NullHandler())  # looked at where an entry asks for it
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="bad_input_") as name:
        entries = ENTRIES[::every]
        found = try_all(entries, Path(name))
        figures.add(figures_of(entries, found))
        faults = dict(list(FAULTS.items())[::every])
        figures.add(endured(faults, Path(name)))
    figures.write()
    good = all(one.outcome == "named" for one in found) and not figures.values["lost"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
