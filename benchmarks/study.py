"""How many completions does it take to reach a training accuracy? Each arm and seed is a real run;
see docs/science.md.

    python -m benchmarks.study              what is missing of the report, then figures and tables
    python -m benchmarks.study --tune       the same arms on the tuning seeds, for choosing settings
    python -m benchmarks.study --report     only figures and tables, from the runs that are there

A finished run is a line of build/study/runs.jsonl, found by (arm, seed, digest of its recipe): a
study can be stopped at any time and goes on where it was. What is compared, and when a run stops,
is fixed in studies/arms.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.presets import merge
from benchmarks.studies.arms import (
    ARMS,
    CANDIDATES,
    CAP,
    POOL,
    REPORT_SEEDS,
    SAMPLES,
    STOP_AT,
    TUNING_SEEDS,
)
from benchmarks.studies.report import write_report
from benchmarks.studies.runs import Records, base_recipe, digest, perform_all, resolve

FOLDER = Path("build/study")


def jobs(
    arms: Sequence[str], seeds: Sequence[int], cache: Path
) -> list[tuple[str, int, RunConfig]]:
    """(arm, seed, its checked configuration), seed by seed so that a study cut short has whole
    seeds."""
    base = base_recipe(POOL, cache, FOLDER)
    base = merge(
        base, {"evaluation": {"pool": {"every": 1, "samples": SAMPLES, "stop_at": STOP_AT}}}
    )
    return [
        (name, seed, resolve(base, (ARMS | CANDIDATES)[name], seed, CAP))
        for seed in seeds
        for name in arms
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *CANDIDATES), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"default: {REPORT_SEEDS}")
    parser.add_argument(
        "--tune", action="store_true", help=f"the tuning seeds {TUNING_SEEDS}, no report"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument(
        "--workers", type=int, default=2, help="runs at a time; each keeps about one core busy"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("build/cache"), help="where the cold start is"
    )
    options = parser.parse_args()
    seeds = options.seeds or list(TUNING_SEEDS if options.tune else REPORT_SEEDS)
    if options.tune and set(seeds) & set(REPORT_SEEDS):
        parser.error(f"--tune must not use the report's seeds {REPORT_SEEDS}")
    arms = options.arms or [*ARMS, *(CANDIDATES if options.tune else ())]
    records = Records(FOLDER / "runs.jsonl")
    todo = jobs(arms, seeds, options.cache)
    failed = [] if options.report else perform_all(todo, records, options.workers)
    if failed:
        raise SystemExit(
            f"{len(failed)} runs failed ({', '.join(failed)}): start again to repeat them"
        )
    found = [
        record for name, seed, config in todo if (record := records.get(name, seed, digest(config)))
    ]
    write_report(found, publish=not options.tune)


if __name__ == "__main__":
    main()
