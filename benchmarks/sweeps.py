"""Parts, fresh:replayed, lambda and shapes of the paper's rule, one varied at a time; see
docs/science.md.

    python -m benchmarks.sweeps             table and figures of the records that are kept
    python -m benchmarks.sweeps --run       measures what is missing first (hours)

Runs are those of the study (same pool, same cold start), all of the same number of completions.
They are kept in benchmarks/records/sweeps.jsonl, so sweeps can be stopped and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.overlays import merge
from benchmarks.harness import Figures, parser, smoke_recipe
from benchmarks.studies.arms import POOL, SAMPLES, SMOKE_CAP, SMOKE_POOL
from benchmarks.studies.report import DOCUMENT, insert
from benchmarks.studies.runs import (
    RECIPE,
    RECORDS,
    Records,
    add_options,
    base_recipe,
    report_or_run,
    resolve,
)
from benchmarks.studies.sweep_arms import ARMS, BASE, COMPLETIONS, SEEDS, measured_every
from benchmarks.studies.sweep_report import by_arm, draw, flat, table

FOLDER = Path("build/study")


def jobs(
    arms: Sequence[str], seeds: Sequence[int], cache: Path, smoke: Path | None
) -> list[tuple[str, int, RunConfig]]:
    """(arm, seed, its checked configuration), seed by seed."""
    recipe = smoke_recipe(smoke) if smoke is not None else RECIPE
    base = base_recipe(SMOKE_POOL if smoke else POOL, cache, smoke or FOLDER, recipe)
    found = []
    for seed in seeds:
        for name in arms:
            pool = {"every": measured_every(ARMS[name]), "samples": SAMPLES}
            raw = merge(base, {"evaluation": {"pool": pool}})
            completions = SMOKE_CAP if smoke else COMPLETIONS
            found.append((name, seed, resolve(raw, ARMS[name], seed, completions)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    add_options(options_of)
    options_of.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    options = options_of.parse_args(arguments)
    seeds, arms = list(options.seeds or SEEDS), list(options.arms)
    records, smoke = Records(RECORDS / "sweeps.jsonl"), None
    if options.smoke:
        options.run, seeds, arms, smoke = True, seeds[:1], [BASE], options.out / "sweeps"
        records = Records(smoke / "sweeps.jsonl")
    found = by_arm(
        report_or_run(
            options, records, lambda: jobs(arms, seeds, options.cache, smoke), arms, seeds
        )
    )
    print(table(found))
    figures = Figures("sweeps", options.out)
    figures.add(flat(found))
    figures.write()
    images = DOCUMENT.parent / "figures" if options.publish else options.out / "sweeps"
    print(*draw(found, images), sep="\n")
    if options.publish:
        insert(DOCUMENT, table(found), "sweeps")


if __name__ == "__main__":
    main()
