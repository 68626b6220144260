"""The papers' tables of parts on the synthetic world: method, rewards one after the other,
fresh:replayed, lambda, with and without a cold start, and the share of solved prompts over time;
see docs/science.md.

    python -m benchmarks.ablations            tables and figures of the records that are kept
    python -m benchmarks.ablations --run      measures what is missing first (a minute a run)

Every run begins with the demo's own cold start (recipes/assets/tiny_omni), so none is trained. They
are kept in benchmarks/records/ablations.jsonl with the commit and the digest of their recipe: a
measurement can be stopped and resumed, and records of other settings than today's are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.recipe.overlays import merge
from avatar_rl.cluster.recipe.ready_start import ready_start
from avatar_rl.common.files import sha256_of
from benchmarks.harness import Figures, parser, smoke_recipe
from benchmarks.studies.ablation_arms import (
    ARMS,
    COMPLETIONS,
    SEEDS,
    SMOKE_ARM,
    measured_every,
)
from benchmarks.studies.ablation_report import draw, flat, in_order, tables
from benchmarks.studies.arms import POOL, SAMPLES, SMOKE_CAP, SMOKE_POOL
from benchmarks.studies.report import DOCUMENT, insert
from benchmarks.studies.runs import (
    RECORDS,
    Ground,
    Pool,
    Records,
    add_options,
    on_ground,
    prepare_ground,
    recipe_digest,
    report_or_run,
    resolve,
)

RECIPE = Path("recipes/local.yaml")
FOLDER = Path("build/ablations")


def configure(ground: Ground, name: str, seed: int, cache: Path, completions: int) -> RunConfig:
    """An arm's checked configuration."""
    arm = ARMS[name]
    base = merge(
        on_ground(ground, cache),
        {
            "evaluation": {"pool": {"every": measured_every(arm), "samples": SAMPLES}},
            # Every group of every step, for the share of prompts that were ever solved.
            "output": {"samples_every": 1, "samples": 64},
        },
    )
    if arm.untrained:
        assert ground.untrained != ground.start, "the recipe has no cold start to go without"
        base = merge(base, {"model": {"path": str(ground.untrained)}})
    return resolve(base, arm, seed, completions)


def digest_of(config: RunConfig, *, ground: Ground, pool: Pool, start: str) -> str:
    """``recipe_digest`` of an arm. ``start`` is the cold start's sha256."""
    return recipe_digest(
        config,
        {
            "world": ground.raw["data"]["synthetic"],
            "pool": asdict(pool),
            "start": None if config.model.path == str(ground.untrained) else start,
        },
    )


def stale(records: Sequence[dict[str, Any]]) -> list[str]:
    """Records that were made with other settings than their arm has today, and why that matters
    is for the reader to say."""
    local = load_recipe(RECIPE)
    start = ready_start(local)
    raw, at = yaml.safe_load(RECIPE.read_text()), Path("nowhere")
    ground = Ground(raw, at, Path("untrained"), at, at, at)
    sha = sha256_of(start / "model.safetensors") if start is not None else ""
    found = []
    for one in records:
        config = configure(ground, one["arm"], one["seed"], at, COMPLETIONS)
        if digest_of(config, ground=ground, pool=POOL, start=sha) != one["digest"]:
            found.append(f"{one['arm']} seed {one['seed']} (commit {one['commit']})")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    add_options(options_of)
    options_of.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    options = options_of.parse_args(arguments)
    seeds, arms = list(options.seeds or SEEDS), list(options.arms)
    records = Records(RECORDS / "ablations.jsonl")
    folder, recipe, pool, completions = FOLDER, RECIPE, POOL, COMPLETIONS
    if options.smoke:
        folder = options.out / "ablations"
        options.run, seeds, arms = True, seeds[:1], [SMOKE_ARM]
        recipe, pool, completions = smoke_recipe(folder), SMOKE_POOL, SMOKE_CAP
        records = Records(folder / "ablations.jsonl")
    key_of = None
    jobs: list[tuple[str, int, RunConfig]] = []
    if options.run:
        ground = prepare_ground(pool, options.cache, folder, recipe)
        sha = sha256_of(ground.start / "model.safetensors")
        key_of = partial(digest_of, ground=ground, pool=pool, start=sha)
        # Seed by seed, so that a measurement cut short has whole seeds.
        jobs = [
            (name, seed, configure(ground, name, seed, options.cache, completions))
            for seed in seeds
            for name in arms
        ]
    found = in_order(report_or_run(options, records, lambda: jobs, arms, seeds, key_of))
    text = tables(found)
    print(text)
    figures = Figures("ablations", options.out)
    figures.add(flat(found))
    if not options.smoke:
        old = stale([one for runs in found.values() for one in runs])
        figures.add({"stale_records": len(old)})
        for one in old:
            print(f"STALE, other settings than today's: {one}")
    figures.write()
    images = DOCUMENT.parent / "figures" if options.publish else options.out / "ablations"
    print(*draw(found, images), sep="\n")
    if options.publish:
        insert(DOCUMENT, text, "ablations")


if __name__ == "__main__":
    main()
