"""Do hints solve what stays at zero -> build/bench/hints.json; run with ``make bench NAME=hints``,
12 minutes.

The cold start is taught one fixed answer to "Which pitch does each shape make?" in 96 of 100 cases
unless a hint is shown; then it is taught to look. The pool holds only prompts to which that answer
is wrong in every part: without a hint the success rate (``start_success``) is a few percent.
``solved_*`` are the shares of the pool that any training completion ever answered right, presets
grpo, avatar_no_hint and avatar on the same number of completions, means over the seeds.
docs/benchmarks.md says how to read them."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from avatar_rl.cluster.config import LoopConfig, RunConfig
from avatar_rl.cluster.recipe.content import key
from avatar_rl.cluster.recipe.overlays import merge
from avatar_rl.cluster.recipe.presets import stated
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluate import evaluate
from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.synthetic.config import Category, WorldConfig
from avatar_rl.rewards.answers.accuracy import SOLVED
from benchmarks.harness import Figures, parser
from benchmarks.studies.habits import Habits, make_world

METHODS = {"grpo": "grpo", "no_hint": "avatar_no_hint", "hint": "avatar"}
TYPE = Category.LOCALISE
HABITS = Habits({TYPE: "Left: low / Right: high"})
POOL = 24
WORLD = WorldConfig(
    n_train=10 * POOL,
    n_heldout=0,
    n_sft=3600,
    weights={TYPE: 1.0},
    guess_share={},
    hinted_share=0.0,
    sft_weights={
        Category.COLOUR: 0.3,
        Category.PITCH: 0.7,
        Category.SIDE: 1.0,
        Category.ORDER: 0.5,
        TYPE: 4.0,
    },
)
RECIPE: dict[str, Any] = {
    "data": {"template": {"max_prompt_tokens": 256}},
    "rollout": {
        "max_sequences": 64,
        "engine": {
            "max_model_len": 320,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": 64 << 20,
        },
        "sampling": {"max_tokens": 48},
    },
    "learner": {
        "objective": {"beta": 0.02},
        "optimizer": {"lr": 1e-4, "freeze": ["visual", "audio_tower"]},
    },
    "buffer": {"warm_up": 64},
    "loop": {"prompts_per_step": 8},
    "evaluation": {"every": 0},
    "output": {"samples_every": 1, "samples": 8, "report": False, "export": False},
    "screen": "plain",
}


def steps_for(completions: int, loop: LoopConfig, warm_up: int) -> int:
    """The most steps that generate no more than ``completions``."""
    made = steps = 0
    while True:
        made += loop.prompts_per_step * loop.fresh_at(steps, warm_up)
        if made > completions:
            return steps
        steps += 1


def run(
    method: str, seed: int, model: Path, files: dict[str, str], options: argparse.Namespace
) -> Path:
    """One training run in a process of its own; returns its folder."""
    raw = merge(
        merge(RECIPE, stated(method)),
        {
            "name": f"{method}-{seed}",
            "seed": seed,
            "model": {"path": str(model)},
            "data": {"train": files["train"]},
            "rewards": {"weights": {"format": 0.5, "accuracy": 0.5}},
            "output": {"folder": str(options.folder / "runs")},
        },
    )
    config = RunConfig.model_validate(raw)
    raw = merge(
        raw, {"loop": {"steps": steps_for(options.completions, config.loop, config.buffer.warm_up)}}
    )
    recipe = options.folder / f"{method}-{seed}.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    subprocess.run(
        [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(recipe)],
        check=True,
        timeout=600,
    )
    return max((options.folder / "runs").glob(f"{method}-{seed}-*"))


def completions_of(run: Path) -> Iterator[dict[str, Any]]:
    """Every training completion of a run, oldest step first."""
    for file in sorted((run / "samples").glob("step_*.jsonl")):
        yield from read_jsonl(file)


def outcome(run: Path) -> dict[str, float]:
    """Share of the pool that was ever answered right; how many completions, and how many of them
    with a hint."""
    rows = list(completions_of(run))
    solved = {row["prompt_id"] for row in rows if row["components"]["accuracy"] >= SOLVED}
    first = [row for row in rows if not row["hinted"]][: POOL * 4]
    return {
        "solved": len(solved) / POOL,
        "completions": len(rows),
        "hinted_share": sum(bool(row["hinted"]) for row in rows) / len(rows),
        "start_success": sum(row["components"]["accuracy"] >= SOLVED for row in first) / len(first),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--seeds", type=int, default=3)
    options_of.add_argument("--completions", type=int, default=768, help="budget of each run")
    options_of.add_argument("--sft-steps", type=int, default=700)
    options_of.add_argument("--folder", type=Path, default=Path("build/bench/hints"))
    options_of.add_argument("--cache", type=Path, help="of models; default: below --folder")
    options = options_of.parse_args(arguments)
    methods, world = METHODS, WORLD
    if options.smoke:
        options.seeds, options.completions, options.sft_steps = 1, 128, 2
        options.folder = options.out / "hints"
        methods = {name: METHODS[name] for name in ("grpo", "hint")}
        world = WORLD.model_copy(update={"n_train": 3 * POOL, "n_sft": 32})
    options.folder.mkdir(parents=True, exist_ok=True)
    figures = Figures("hints", options.out)
    folder = options.folder / f"world-{key(world.model_dump(mode='json'))}"
    files = make_world(folder, world, HABITS, pool=POOL)
    optimizer = {"lr": 1.5e-3, "betas": [0.9, 0.95], "weight_decay": 0.01}
    sft = {"steps": options.sft_steps, "batch_size": 32, "ranks": 2, "optimizer": optimizer}
    cache = options.cache or options.folder / "cache"
    output = {"cache": str(cache), "folder": str(options.folder / "runs")}
    raw = merge(RECIPE, {"name": "cold-start", "data": files, "cold_start": sft, "output": output})
    with Screen(1, title="cold start") as screen:
        model = evaluate(RunConfig.model_validate(raw), screen).model
    found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for seed in range(options.seeds):
        for name, method in methods.items():
            found[name].append(outcome(run(method, seed, model, files, options)))
            print(name, seed, found[name][-1], flush=True)
    for name, outcomes in found.items():
        solved = [one["solved"] for one in outcomes]
        figures.add({f"solved_{name}": statistics.mean(solved), f"solved_{name}_low": min(solved)})
        figures.add({f"solved_{name}_high": max(solved)})
        figures.add(
            {f"completions_{name}": statistics.mean(one["completions"] for one in outcomes)}
        )
    figures.add({"hinted_share": statistics.mean(one["hinted_share"] for one in found["hint"])})
    figures.add({"start_success": statistics.mean(one["start_success"] for one in found["grpo"])})
    figures.add({"prompts": POOL, "seeds": options.seeds})
    figures.write()


if __name__ == "__main__":
    main()
