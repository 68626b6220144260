"""Parts, fresh:replayed, lambda and shapes of the paper's rule, one varied at a time; see
docs/science.md.

    python -m benchmarks.sweeps             what is missing of the runs, then table and figures
    python -m benchmarks.sweeps --report    only table and figures, from the runs that are there

Runs are those of the study (same pool, same cold start), all of the same number of completions;
they are kept in build/study/sweeps.jsonl, so that sweeps can be stopped and go on."""

from __future__ import annotations

import argparse
from pathlib import Path

from avatar_rl.cluster.recipe.presets import merge
from benchmarks.harness import Figures
from benchmarks.studies.arms import POOL, SAMPLES
from benchmarks.studies.report import DOCUMENT, insert
from benchmarks.studies.runs import Records, base_recipe, digest, perform_all, resolve
from benchmarks.studies.sweep_arms import ARMS, COMPLETIONS, SEEDS, measured_every
from benchmarks.studies.sweep_report import by_arm, draw, flat, table

FOLDER = Path("build/study")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument(
        "--workers", type=int, default=2, help="runs at a time; each keeps about one core busy"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("build/cache"), help="where the cold start is"
    )
    options = parser.parse_args()
    base = base_recipe(POOL, options.cache, FOLDER)
    todo = []
    for seed in options.seeds:
        for name in options.arms:
            pool = {"every": measured_every(ARMS[name]), "samples": SAMPLES}
            recipe = merge(base, {"evaluation": {"pool": pool}})
            todo.append((name, seed, resolve(recipe, ARMS[name], seed, COMPLETIONS)))
    records = Records(FOLDER / "sweeps.jsonl")
    failed = [] if options.report else perform_all(todo, records, options.workers)
    if failed:
        raise SystemExit(
            f"{len(failed)} runs failed ({', '.join(failed)}): start again to repeat them"
        )
    arms = by_arm(
        [
            record
            for name, seed, config in todo
            if (record := records.get(name, seed, digest(config)))
        ]
    )
    print(table(arms))
    figures = Figures("sweeps")
    figures.add(flat(arms))
    figures.write()
    print(*draw(arms, DOCUMENT.parent / "figures"), sep="\n")
    insert(DOCUMENT, table(arms), "sweeps")


if __name__ == "__main__":
    main()
