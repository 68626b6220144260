"""How many completions does it take to reach a training accuracy? Each arm and seed is a real run;
see docs/science.md.

    python -m benchmarks.study              tables and figures of the records that are kept
    python -m benchmarks.study --run        measures what is missing first (hours)
    python -m benchmarks.study --tune       the tuning seeds instead, for choosing settings

A finished run is a line of benchmarks/records/study.jsonl, found by (arm, seed, digest of its
recipe). So a study can be stopped at any time and resumes where it was. What is compared, and when
a run stops, is fixed in studies/arms.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.overlays import merge
from benchmarks.harness import Figures, parser, smoke_recipe
from benchmarks.studies.arms import (
    ARMS,
    CANDIDATES,
    CAP,
    POOL,
    REPORT_SEEDS,
    SAMPLES,
    SMOKE_ARM,
    SMOKE_CAP,
    SMOKE_POOL,
    STOP_AT,
    TUNING_SEEDS,
)
from benchmarks.studies.report import write_report
from benchmarks.studies.runs import (
    RECIPE,
    RECORDS,
    Records,
    add_options,
    base_recipe,
    report_or_run,
    resolve,
)

FOLDER = Path("build/study")


def jobs(
    arms: Sequence[str], seeds: Sequence[int], cache: Path, smoke: Path | None
) -> list[tuple[str, int, RunConfig]]:
    """(arm, seed, its checked configuration), seed by seed so that a study cut short has whole
    seeds. ``smoke``: the folder of the smallest one."""
    recipe = smoke_recipe(smoke) if smoke is not None else RECIPE
    base = base_recipe(SMOKE_POOL if smoke else POOL, cache, smoke or FOLDER, recipe)
    base = merge(
        base, {"evaluation": {"pool": {"every": 1, "samples": SAMPLES, "stop_at": STOP_AT}}}
    )
    return [
        (name, seed, resolve(base, (ARMS | CANDIDATES)[name], seed, SMOKE_CAP if smoke else CAP))
        for seed in seeds
        for name in arms
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    add_options(options_of)
    options_of.add_argument("--arms", nargs="+", choices=(*ARMS, *CANDIDATES), help="default: all")
    options_of.add_argument(
        "--tune", action="store_true", help=f"the tuning seeds {TUNING_SEEDS}, not published"
    )
    options = options_of.parse_args(arguments)
    seeds = options.seeds or list(TUNING_SEEDS if options.tune else REPORT_SEEDS)
    arms = options.arms or [*ARMS, *(CANDIDATES if options.tune else ())]
    if options.tune and (options.publish or set(seeds) & set(REPORT_SEEDS)):
        options_of.error(f"--tune neither publishes nor uses the report's seeds {REPORT_SEEDS}")
    records, smoke = Records(RECORDS / "study.jsonl"), None
    if options.smoke:
        options.run, seeds, arms, smoke = True, seeds[:1], [SMOKE_ARM], options.out / "study"
        records = Records(smoke / "study.jsonl")
    found = report_or_run(
        options, records, lambda: jobs(arms, seeds, options.cache, smoke), arms, seeds
    )
    write_report(found, Figures("study", options.out), publish=options.publish)


if __name__ == "__main__":
    main()
