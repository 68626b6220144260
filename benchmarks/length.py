"""Does shaping advantages over time pay, and at what length? -> build/bench/length.json. See
docs/science.md.

    python -m benchmarks.length                      tables and figures of the kept records
    python -m benchmarks.length --run --minutes 60   measures what is missing first

Reasoning of about 40, 120 and 320 tokens over the same clips: a plan, notes on every part, a
conclusion. The cold start is wrong in seven of ten, in each of the three equally often
(studies/length_notes.py); it is trained first where the cache has none. What is compared is fixed
in studies/length_arms.py. A finished run is a line of benchmarks/records/length.jsonl, so a study
can be stopped and resumed; records of another protocol are refused, those of other settings
named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import prepare_base_model, prepare_datasets
from avatar_rl.cluster.recipe.content import key
from avatar_rl.cluster.recipe.load import check
from avatar_rl.cluster.recipe.overlays import Overlay, merge
from avatar_rl.common.files import read_jsonl, replace_text
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.world import synthesize
from benchmarks.harness import Figures, parser
from benchmarks.studies.length_arms import (
    BEFORE,
    CELLS,
    COLD_START,
    COMPLETIONS,
    HONEST,
    MEASURE,
    MOST_TOKENS,
    RECIPE,
    SAMPLES,
    SEEDS,
    SMOKE_CELL,
    SMOKE_START,
    SMOKE_WORLD,
    WORLD,
    ground_of,
    protocol,
)
from benchmarks.studies.length_notes import taught
from benchmarks.studies.length_report import draw, flat, in_order, tables
from benchmarks.studies.report import DOCUMENT, insert
from benchmarks.studies.runs import (
    RECORDS,
    Ground,
    Records,
    add_options,
    cold_start,
    measured,
    on_ground,
    perform_all,
    recipe_digest,
)

FOLDER = Path("build/study_length")


def prepare(
    folder: Path, cache: Path, name: str, world: WorldConfig = WORLD, start: Overlay = COLD_START
) -> Ground:
    """Makes what a cell needs and is not there yet: world, reasoning, cold start of its length."""
    folder.mkdir(parents=True, exist_ok=True)
    cell = CELLS[name]
    at = (folder / f"world-{key(world.model_dump(mode='json'))}").resolve()
    if not at.is_dir():
        synthesize(at, world)
    rows = taught(list(read_jsonl(at / "sft.jsonl")), cell.length, HONEST, world.seed)
    sft = at / f"sft-{cell.length}.jsonl"
    replace_text(sft, "".join(json.dumps(row) + "\n" for row in rows))
    recipe = merge(RECIPE, cell.arm.over)
    raw: Overlay = {
        "name": f"length-{cell.length}-start",
        "model": {"path": BEFORE},
        "data": {
            "sft": str(sft),
            "train": str(at / "train.jsonl"),
            "heldout": str(at / "heldout.jsonl"),
        },
        "cold_start": start,
        "output": {"cache": str(cache), "folder": str(folder / "start")},
        "evaluation": {"limit": 16},
        "screen": "plain",
    }
    config = check(merge(recipe, raw), source=f"cold start of the length study, {cell.length}")
    datasets, base = prepare_datasets(config, print), prepare_base_model(config, print)
    assert datasets.heldout is not None
    taught_start = cold_start(config, base, datasets, folder)
    return Ground(RECIPE, taught_start, base, datasets.train, datasets.heldout, at)


def configure(
    ground: Ground, name: str, seed: int, cache: Path, completions: int = COMPLETIONS
) -> RunConfig:
    """A cell's checked configuration, measured after every MEASURE completions."""
    base, pool = on_ground(ground, cache), {"samples": SAMPLES}
    return measured(base, CELLS[name].arm, seed, completions, between=MEASURE, pool=pool)


def length_of(config: RunConfig) -> str:
    """The length that a configuration of ``configure`` is for."""
    return {most: name for name, most in MOST_TOKENS.items()}[config.rollout.sampling.max_tokens]


def stale(records: Sequence[dict[str, Any]]) -> list[str]:
    """Records that were made with other settings than their arm has today."""
    at = Path("nowhere")
    ground = Ground(RECIPE, at, at, at, at, at)
    return [
        f"{one['arm']} seed {one['seed']} (commit {one['commit']})"
        for one in records
        if recipe_digest(
            configure(ground, one["arm"], one["seed"], at), ground_of(CELLS[one["arm"]].length)
        )
        != one["digest"]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    add_options(options_of)
    options_of.add_argument("--arms", nargs="+", choices=tuple(CELLS), default=list(CELLS))
    options_of.add_argument("--minutes", type=float, default=float("inf"), help="begin none after")
    options_of.add_argument("--records", type=Path, help="file of finished runs")
    options = options_of.parse_args(arguments)
    seeds, names = list(options.seeds or SEEDS), list(options.arms)
    folder, world, start = FOLDER, WORLD, COLD_START
    kept, completions = RECORDS / "length.jsonl", COMPLETIONS
    if options.smoke:
        options.run, seeds, names, completions = True, [0], [SMOKE_CELL], 16
        folder, world, start = options.out / "length", SMOKE_WORLD, SMOKE_START
        kept = folder / "length.jsonl"
    records = Records(options.records or kept)
    if options.run:
        records.refuse_others({"protocol": protocol()})
        by_length = {
            length: prepare(folder, options.cache, name, world, start)
            for length, name in {CELLS[name].length: name for name in names}.items()
        }
        grounds = {name: by_length[CELLS[name].length] for name in names}
        jobs = [
            (name, seed, configure(grounds[name], name, seed, options.cache, completions))
            for seed in seeds
            for name in names
        ]
        failed = perform_all(
            jobs,
            records,
            options.workers,
            lambda config: recipe_digest(config, ground_of(length_of(config), start)),
            minutes=options.minutes,
            beside={"protocol": protocol()},
            keep_crashes=True,
        )
        if failed:
            print(f"{len(failed)} runs crashed ({', '.join(failed)}): --run repeats them")
    found = [one for one in records.newest(names, seeds) if "crashed" not in one]
    if not found:
        raise SystemExit(
            f"no records of these runs in {records.path}; --run measures all "
            f"{len(names) * len(seeds)} (one to six minutes each, by their length)"
        )
    report(found, options.out, publish=options.publish, smoke=options.smoke)


def report(found: Sequence[dict[str, Any]], out: Path, *, publish: bool, smoke: bool) -> None:
    """Tables and figures of some records; into docs/ where ``publish``."""
    figures = Figures("length", out)
    if not smoke:
        old = stale(found)
        figures.add({"stale_records": len(old)})
        for one in old:
            print(f"STALE, other settings than today's: {one}")
    arms = in_order(found)
    text = tables(arms)
    print(text)
    figures.add(flat(arms))
    figures.write()
    images = DOCUMENT.parent / "figures" if publish else out / "length"
    print(*draw(arms, images), sep="\n")
    if publish:
        insert(DOCUMENT, text, "length")


if __name__ == "__main__":
    main()
