"""A real pretrained text model learns on two cores -> build/bench/real_text.json; ``make bench
NAME=real_text``, half an hour.

Gemma 3 270M (benchmarks/real_model.py) is asked sums in two steps (benchmarks/word_problems.py) as
it is, after a short cold start, and after RL with LoRA; all three on the same held-out prompts,
greedily. Before that: engine and learner agree on its log-probabilities, an update of full
fine-tuning is timed against one with LoRA, and packs against copied prompts. The weights stay in
``--folder``, outside the repository."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
import yaml
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.actors.engine.engine import RolloutEngine
from avatar_rl.cluster.benchmarks.intervals import wilson
from avatar_rl.cluster.recipe.overlays import merge
from avatar_rl.cluster.services.services import CPU_ENVIRONMENT, ENVIRONMENT
from avatar_rl.cluster.telemetry.run_files import read_metrics
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from benchmarks.harness import Figures, parser, spread
from benchmarks.learner_side import (
    GROUP,
    BenchLearner,
    FrozenPrompts,
    make_spec,
    make_step,
    score,
    with_behaviour,
)
from benchmarks.packed_side import PackedSide
from benchmarks.real_model import Absent, make_folder
from benchmarks.text_sides import CopiedText
from benchmarks.word_problems import write_problems
from tests.parity_stage import run as run_engine
from tests.tiny_families import gemma3

Figure = Iterator[tuple[str, float]]
HELDOUT = 256
PROBLEMS = {"heldout": HELDOUT, "sft": 2000, "train": 1000}
#: What the cold start mostly learns is to guess: RL has to find out that working it out pays.
GUESSED = {"sft": 0.6}
LORA = {"rank": 16, "alpha": 32}
RECIPE: dict[str, Any] = {
    "name": "real-text",
    "seed": 0,
    "preset": "grpo",  # on two cores to learn costs as much as to generate: replay saves nothing
    "data": {"template": {"max_prompt_tokens": 128}},
    "cold_start": {
        "steps": 80,
        "batch_size": 24,
        "ranks": 2,
        "warmup": 5,
        "lora": LORA,
        "optimizer": {"lr": 1e-3, "dtype": "bfloat16"},
    },
    "rollout": {
        "max_sequences": 64,
        "engine": {
            "dtype": "bfloat16",
            "max_model_len": 256,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": 256 << 20,
            "threads": 2,  # the learner waits for rollouts more than half of its time
        },
        "sampling": {"max_tokens": 48},
    },
    "rewards": {"numeric": "exact"},
    "learner": {
        "ranks": 2,
        "lora": LORA,
        "objective": {"beta": 0.0},
        "optimizer": {"lr": 1e-4, "dtype": "bfloat16"},
    },
    "loop": {"steps": 30, "prompts_per_step": 8},
    "evaluation": {"every": 0},
    "output": {"report": False, "export": False},
    "screen": "plain",
}
SHORT: dict[str, Any] = {  # of --smoke
    "cold_start": {"steps": 2},
    "loop": {"steps": 2, "prompts_per_step": 2},
    "evaluation": {"limit": 4},
}


@dataclass(frozen=True)
class Sizes:
    """What is timed at which sizes."""

    prompts: int = 2  # with eight completions each
    rounds: int = 3


SMOKE = Sizes(prompts=1, rounds=1)
SMOKE_PARTS = ["parity", "steps"]  # a run has tests of its own


def apart(part: Callable[..., Figure], *arguments: object) -> dict[str, float]:
    """The figures of a part, from a process of its own: the 10 GB of its models and optimisers are
    the run's afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_figures, part, *arguments).result()


def _figures(part: Callable[..., Figure], *arguments: object) -> dict[str, float]:
    disable_progress_bar()
    return dict(part(*arguments))


# -- engine against learner ------------------------------------------------------------------------


def parity(model: Path, prompts: PromptIndex, count: int) -> Figure:
    """The largest difference of a sampled token's log-probability between vLLM and the learner's
    model in float32, and of each from transformers' model in float64."""
    encoder = encoder_of(model)
    engine = RolloutEngine(model, EngineConfig(device="cpu", dtype="float32", max_model_len=1024))
    asked = [prompts[name] for name in prompts.ids[:count]]
    sampling = RequestSampling(n=2, max_tokens=32)
    try:
        done = run_engine(engine, encoder, asked, sampling)
    finally:
        engine.close()
    policy = Policy(load_model(model, dtype="float32")).eval()
    exact: Any = hf.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager"
    )
    gaps = {"gap": 0.0, "engine": 0.0, "learner": 0.0}
    for prompt, finished in zip(asked, done, strict=True):
        encoded = encoder.encode(prompt, False)
        parts = finished.completions
        rows = [Row((prompt.id, False), encoded, part.token_ids) for part in parts]
        with torch.no_grad():
            found = policy(collate(rows)).logprobs.numpy()
        for values, part in zip(found, parts, strict=True):
            ours, true = values[: len(part.logprobs)], true_logprobs(exact, encoded, part.token_ids)
            for name, one, other in (
                ("gap", ours, part.logprobs),
                ("engine", part.logprobs, true),
                ("learner", ours, true),
            ):
                gaps[name] = max(gaps[name], float(np.abs(one - other).max()))
    for name, gap in gaps.items():
        yield f"parity_{name}_ppm", 1e6 * gap


@torch.no_grad()
def true_logprobs(model: Any, prompt: EncodedPrompt, tokens: NDArray[np.int32]) -> Any:
    """Of a completion's tokens, in float64."""
    ids = torch.cat([prompt.input_ids, torch.from_numpy(tokens).long()])[None]
    logits = model(ids).logits[0, -len(tokens) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, -len(tokens) :, None])[:, 0].numpy()


def encoder_of(model: Path) -> PromptEncoder:
    return PromptEncoder(model, MediaLoader(MediaConfig(), base=Path(".")), TemplateConfig())


# -- full fine-tuning against LoRA, packs against copies -------------------------------------------


def steps(model: Path, prompts: PromptIndex, sizes: Sizes) -> Figure:
    """Seconds of an update of full fine-tuning over those of LoRA; and of the forward and backward
    of copied prompts over those of packs. In turns, on the same rows in bfloat16."""
    encoder = encoder_of(model)
    names = prompts.ids[: sizes.prompts]
    encoded = {name: encoder.encode(prompts[name], False) for name in names}
    rng = np.random.default_rng(0)
    tokens = (10, encoder.tokenizer.vocab_size)
    work = make_step(0, encoded, rng, shortest=24, longest=48, tokens=tokens)
    loaded = Policy(load_model(model, dtype="bfloat16")).eval()
    work = with_behaviour(work, score(loaded, work, encoded))
    del loaded
    sides = {
        name: BenchLearner(make_spec(model, model, config), FrozenPrompts(encoded))
        for name, config in {"full": config_of(), "lora": config_of(LoraConfig(**LORA))}.items()
    }
    for side in sides.values():
        side.update(work)  # allocates the optimiser's state
    times = [{n: side.seconds([work])[0] for n, side in sides.items()} for _ in range(sizes.rounds)]
    yield "step_s_full", statistics.median(spent["full"] for spent in times)
    yield "step_s_lora", statistics.median(spent["lora"] for spent in times)
    yield from spread("step_speedup", [spent["full"] / spent["lora"] for spent in times])
    sides.clear()
    rows = [
        Row((t.prompt_id, False), encoded[t.prompt_id], t.token_ids)
        for group in work.groups
        for t in group.trajectories
    ]
    budget = LearnerConfig().pack_tokens()
    packed = PackedSide(model, rows, dtype="bfloat16", budget=budget, recompute=False)
    copied = CopiedText(model, rows, GROUP)
    gap = abs(packed.run() - copied.run())
    yield "packed_loss_gap_ppm", 1e6 * gap
    packed.model.zero_grad(set_to_none=True)
    copied.model.zero_grad(set_to_none=True)
    ratios = [copied.seconds() / packed.seconds() for _ in range(sizes.rounds)]
    yield from spread("packed_vs_copied", ratios)
    yield "packed_vs_copied_ceiling", copied.positions / packed.positions


def config_of(lora: LoraConfig | None = None) -> LearnerConfig:
    """What the run below trains with, at a rate that leaves the frozen rows as they are."""
    return LearnerConfig(
        objective=ObjectiveConfig(beta=0.0),
        optimizer=OptimizerConfig(lr=1e-7, dtype="bfloat16"),
        lora=lora,
    )


# -- the run ---------------------------------------------------------------------------------------


def train(model: Path, files: dict[str, str], options: argparse.Namespace) -> Path:
    """Cold start and RL as a user starts them; the run's folder."""
    folder = options.folder
    changes = {
        "model": {"path": str(model)},
        "data": files,
        "output": {"folder": str(folder / "runs"), "cache": str(folder / "cache")},
        "seed": options.seed,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge(merge(RECIPE, changes), options.changes)))
    command = [sys.executable, "-m", "avatar_rl.cluster.cli"]
    subprocess.run([*command, "train", str(recipe)], check=True, timeout=3600)
    return max((folder / "runs").glob("real-text-*"), key=lambda run: run.stat().st_mtime)


def base_accuracy(model: Path, options: argparse.Namespace) -> float:
    """Of the model as it is."""
    command = [sys.executable, "-m", "avatar_rl.cluster.cli", "evaluate", str(model)]
    recipe = str(options.folder / "recipe.yaml")
    before = set((options.folder / "runs").glob("*"))
    subprocess.run([*command, "--recipe", recipe], check=True, timeout=1200)
    (run,) = set((options.folder / "runs").glob("*")) - before
    return accuracies(run)[-1]


def accuracies(run: Path) -> list[float]:
    """Held-out accuracy of every round of a run."""
    rows = read_metrics(run / "metrics.jsonl")
    return [float(row["eval/accuracy"] or 0.0) for row in rows if "eval/accuracy" in row]


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--folder", type=Path, default=Path("build/bench/real_text"))
    options_of.add_argument("--model", type=Path, help="another text model; none: Gemma 3 270M")
    options_of.add_argument("--seed", type=int, default=0)
    options_of.add_argument("--only", choices=("parity", "steps", "run"), action="append")
    options = options_of.parse_args(arguments)
    options.changes, sizes = {}, Sizes()
    which = options.only or ["parity", "steps", "run"]
    if options.smoke:
        options.changes, sizes, options.folder = SHORT, SMOKE, options.out / "real_text"
        if options.model is None:  # 230 MB would be fetched: another model of the kind instead
            options.model, which = gemma3(options.folder / "tiny"), options.only or SMOKE_PARTS
    for name, value in {**ENVIRONMENT, **CPU_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    disable_progress_bar()
    figures = Figures("real_text", options.out)
    began = time.perf_counter()
    try:
        model = options.model or make_folder(
            options.folder / "gemma", options.folder / "packages", torch.bfloat16
        )
    except Absent as error:
        raise SystemExit(f"{error}\nGive another text model with --model FOLDER.") from error
    files = write_problems(options.folder / "rows", PROBLEMS, guessed=GUESSED)
    figures.add({"make_s": time.perf_counter() - began})
    prompts = PromptIndex.read((Path(files["train"]),), DataConfig())
    if "parity" in which:
        figures.add(apart(parity, model, prompts, sizes.prompts))
    if "steps" in which:
        figures.add(apart(steps, model, prompts, sizes))
    if "run" in which:
        began = time.perf_counter()
        found = accuracies(train(model, files, options))
        figures.add({"run_s": time.perf_counter() - began})
        learned = {"base": base_accuracy(model, options), "cold": found[0], "rl": found[-1]}
        for name, share in learned.items():
            at = wilson(share, HELDOUT)
            figures.add({name: share, f"{name}_low": at.low, f"{name}_high": at.high})
        figures.add({"accuracy_gain": learned["rl"] - learned["base"]})
        figures.add({"rl_gain": learned["rl"] - learned["cold"], "heldout": HELDOUT})
    figures.write()


if __name__ == "__main__":
    main()
