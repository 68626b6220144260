"""How many completions to 0.80 where successes are rare? GRPO at several rates and with dynamic
sampling, hints, more updates; the paper's rule; avatar_plus; plain and prioritised replay
-> build/bench/study_sparse.json. See docs/science.md.

    python -m benchmarks.study_sparse                      tables and figures of the kept records
    python -m benchmarks.study_sparse --run --minutes 60   measures what is missing first
    python -m benchmarks.study_sparse --run --tune         the tuning seeds instead, kept in build/

The cold start answers 97 of 100 completions wrong, by habits that it was taught
(studies/habits.py) on top of the demo's cold start. The one that the records began with is in
benchmarks/records/starts; another is trained in two minutes. What is compared is fixed in
studies/sparse_arms.py. Every arm gets a seed before any gets its second, the most
important first. A finished run is a line of benchmarks/records/study_sparse.jsonl, so a study can
be stopped and resumed; records of another protocol are refused, those of other settings named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    cold_start_folder,
    prepare_base_model,
    prepare_datasets,
)
from avatar_rl.cluster.recipe.content import key
from avatar_rl.cluster.recipe.load import check
from avatar_rl.cluster.recipe.overlays import Overlay, merge
from avatar_rl.common.files import sha256_of
from avatar_rl.prompts.synthetic.config import WorldConfig
from benchmarks.harness import Figures, parser
from benchmarks.studies.habits import make_world
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
from benchmarks.studies.sparse_arms import (
    ARMS,
    BEFORE,
    CANDIDATES,
    CAP,
    COLD_START,
    HABITS,
    HELDOUT,
    MEASURE,
    POOL,
    RECIPE,
    REPORT_SEEDS,
    SAMPLES,
    SMOKE_ARM,
    SMOKE_CAP,
    SMOKE_START,
    SMOKE_WORLD,
    START,
    TARGET,
    TUNING_SEEDS,
    WORLD,
    ground_of,
    protocol,
)
from benchmarks.studies.sparse_report import draw, flat, in_order, tables

FOLDER = Path("build/study_sparse")


def prepare(
    folder: Path,
    cache: Path,
    world: WorldConfig = WORLD,
    start: Overlay = COLD_START,
    *,
    pool: int = POOL,
    heldout: int = HELDOUT,
) -> Ground:
    """Makes what is not there yet: world, pool, cold start."""
    folder.mkdir(parents=True, exist_ok=True)
    at = folder / f"world-{key(world.model_dump(mode='json'))}"
    files = make_world(at, world, HABITS, pool=pool, heldout=heldout)
    raw: Overlay = {
        "name": "sparse-start",
        "model": {"path": BEFORE},
        "data": files,
        "cold_start": start,
        "output": {"cache": str(cache), "folder": str(folder / "start")},
        "screen": "plain",
    }
    config = check(merge(RECIPE, raw), source="cold start of the sparse study")
    datasets, base = prepare_datasets(config, print), prepare_base_model(config, print)
    assert datasets.heldout is not None and datasets.sft is not None
    take_kept(cold_start_folder(config, base, datasets.sft))
    taught = cold_start(config, base, datasets, folder)
    return Ground(RECIPE, taught, base, datasets.train, datasets.heldout, at.resolve())


def take_kept(wanted: Path) -> None:
    """The cold start that the records began with, out of the repository. Trained again it would not
    be the same to the bit, and its runs could not stand beside them."""
    kept = RECORDS / "starts" / wanted.name
    if kept.is_dir() and not wanted.is_dir():
        half = wanted.with_suffix(f".{os.getpid()}.tmp")
        shutil.copytree(kept, half)
        half.rename(wanted)


def configure(ground: Ground, name: str, seed: int, cache: Path, cap: int = CAP) -> RunConfig:
    """An arm's checked configuration, measured after every MEASURE completions."""
    arm, base = (ARMS | CANDIDATES)[name], on_ground(ground, cache)
    pool = {"samples": SAMPLES, "stop_at": TARGET}
    return measured(base, arm, seed, cap, between=MEASURE, pool=pool)


def stale(records: Sequence[dict[str, Any]]) -> list[str]:
    """Records that were made with other settings than their arm has today."""
    at = Path("nowhere")
    ground = Ground(RECIPE, at, at, at, at, at)
    return [
        f"{one['arm']} seed {one['seed']} (commit {one['commit']})"
        for one in records
        if recipe_digest(configure(ground, one["arm"], one["seed"], at), ground_of())
        != one["digest"]
    ]


def refuse_solved(records: Sequence[dict[str, Any]]) -> None:
    """Raises SystemExit where the start's accuracy is none of rare successes."""
    starts = [one["curve"][0][-1] for one in records if one.get("curve")]
    mean = sum(starts) / len(starts) if starts else START[0]
    if not START[0] <= mean <= START[1]:
        raise SystemExit(
            f"the cold start answers {mean:.3f} of the pool, where {START[0]} to {START[1]} make "
            "a sparse one: change HABITS.look_share or COLD_START in studies/sparse_arms.py"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    add_options(options_of)
    options_of.add_argument("--arms", nargs="+", choices=(*ARMS, *CANDIDATES), help="default: all")
    options_of.add_argument("--minutes", type=float, default=float("inf"), help="begin none after")
    options_of.add_argument("--records", type=Path, help="file of finished runs")
    options_of.add_argument(
        "--tune", action="store_true", help=f"the tuning seeds {TUNING_SEEDS}, not published"
    )
    options = options_of.parse_args(arguments)
    seeds = options.seeds or list(TUNING_SEEDS if options.tune else REPORT_SEEDS)
    arms = options.arms or [*ARMS, *(CANDIDATES if options.tune else ())]
    if options.tune and (options.publish or set(seeds) & set(REPORT_SEEDS)):
        options_of.error(f"--tune neither publishes nor uses the report's seeds {REPORT_SEEDS}")
    kept = RECORDS / "study_sparse.jsonl"
    folder, world, start, cap = FOLDER, WORLD, COLD_START, CAP
    pool, heldout = POOL, HELDOUT
    if options.tune:
        kept = FOLDER / "tuning.jsonl"
    if options.smoke:
        options.run, seeds, arms, cap = True, [100], [SMOKE_ARM], SMOKE_CAP
        folder, world, start, pool, heldout = (
            options.out / "study_sparse",
            SMOKE_WORLD,
            SMOKE_START,
            4,
            4,
        )
        kept = folder / "study_sparse.jsonl"
    records = Records(options.records or kept)
    if options.run:
        fields = {"protocol": protocol()}
        ground = prepare(folder, options.cache, world, start, pool=pool, heldout=heldout)
        fields["start"] = sha256_of(ground.start / "model.safetensors")[:12]
        records.refuse_others(fields)
        stood = ground_of(start, pool)
        jobs = [
            (name, seed, configure(ground, name, seed, options.cache, cap))
            for seed in seeds
            for name in arms
        ]
        measure = partial(
            perform_all,
            records=records,
            workers=options.workers,
            key_of=lambda config: recipe_digest(config, stood),
            beside=fields,
            keep_crashes=True,
        )
        if not options.smoke:  # the pool is looked at before hours are spent on it
            if measure(jobs[:1], minutes=options.minutes):
                raise SystemExit("the first run crashed, so no other is begun: see above")
            refuse_solved(records.all())
        failed = measure(jobs, minutes=options.minutes)
        if failed:
            print(f"{len(failed)} runs crashed ({', '.join(failed)}): --run repeats them")
    found = records.newest(arms, seeds)
    if not found:
        raise SystemExit(
            f"no records of these runs in {records.path}; --run measures all "
            f"{len(arms) * len(seeds)} (minutes each, about one core a run)"
        )
    figures = Figures("study_sparse", options.out)
    if not options.smoke:
        refuse_solved(found)
        old = stale(found)
        figures.add({"stale_records": len(old)})
        for one in old:
            print(f"STALE, other settings than today's: {one}")
    by_arm = in_order(found)
    text = tables(by_arm)
    print(text)
    figures.add(flat(by_arm))
    figures.write()
    images = DOCUMENT.parent / "figures" if options.publish else options.out / "study_sparse"
    print(*draw(by_arm, images), sep="\n")
    if options.publish:
        insert(DOCUMENT, text, "sparse")


if __name__ == "__main__":
    main()
