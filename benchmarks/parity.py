"""Engine and learner on tiny random checkpoints of every family: log-probabilities and greedy
tokens, before and after three adoptions by the board and three by the gloo twin, against an engine
that was started anew, and by an engine that takes three versions of an adapter.

    make bench NAME=parity                     # all families
    make bench NAME=parity ARGS="--only qwen3_omni_moe"

For each family and each kind of media the largest difference of a token, in nats, between vLLM and
the model that the learner trains. Everything runs in float32 on the CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest, RolloutEngine
from avatar_rl.learner.lora_config import LoraConfig
from benchmarks.harness import Figures, parser
from tests.parity_stage import Stage, layouts_of, run
from tests.tiny_families import FAMILIES

GREEDY = RequestSampling(temperature=0, max_tokens=24)
SAMPLED = RequestSampling(n=2, max_tokens=24)
ADOPTIONS = 3
LORA = LoraConfig(rank=6, alpha=12.0)
SMOKE = ("tied", "qwen3_vl_moe")


def measure(family: str, folder: Path, layouts: int | None, figures: Figures) -> None:
    """One family, its first ``layouts`` layouts of media, or all."""
    stage = Stage(folder / family, family)
    try:
        chosen = dict(list(layouts_of(family).items())[:layouts])
        prompts = stage.prompts(chosen)
        start = stage.gaps(prompts, SAMPLED)
        for name, gap in start.items():
            print(f"  {family:16s} {name:32s} {gap.logprob:.1e}", flush=True)
        greedy = stage.gaps(prompts, GREEDY)
        adopted, other, seconds = 0.0, max(gap.greedy for gap in greedy.values()), []
        for seed in range(1, ADOPTIONS + 1):
            stage.train(seed)
            began = time.perf_counter()
            stage.publish()
            seconds.append(time.perf_counter() - began)
            for gap in stage.gaps(prompts, GREEDY).values():
                adopted, other = max(adopted, gap.logprob), max(other, gap.greedy)
        twin = 0.0
        for seed in range(ADOPTIONS + 1, 2 * ADOPTIONS + 1):
            stage.train(seed)
            stage.publish("twin")
            for gap in stage.gaps(prompts, GREEDY).values():
                twin, other = max(twin, gap.logprob), max(other, gap.greedy)
        here = stage.run(prompts, GREEDY)
        exported = stage.export(folder / f"{family}-export")
    finally:
        stage.close()
    fresh = RolloutEngine(exported, stage.config)
    try:
        anew = run(fresh, stage.encoder, prompts, GREEDY)
    finally:
        fresh.close()
    figures.add(
        {
            f"logprob_{family}": 1e6 * max(gap.logprob for gap in start.values()),
            f"logprob_adopted_{family}": 1e6 * adopted,
            f"logprob_twin_{family}": 1e6 * twin,
            f"logprob_fresh_{family}": 1e6 * difference(here, anew),
            f"greedy_other_{family}": other,
            f"layouts_{family}": len(prompts),
            f"adopt_ms_{family}": 1000 * float(np.median(seconds)),
        }
    )


def measure_adapter(family: str, folder: Path, layouts: int | None, figures: Figures) -> None:
    """The same family with an adapter on its language model, taken by vLLM as it is."""
    stage = Stage(folder / f"{family}-adapter", family, lora=LORA)
    try:
        prompts = stage.prompts(dict(list(layouts_of(family).items())[:layouts]))
        worst = other = 0.0
        for seed in range(1, ADOPTIONS + 1):
            stage.train_adapter(seed)
            stage.publish("adapter")
            for gap in stage.gaps(prompts, GREEDY).values():
                worst, other = max(worst, gap.logprob), max(other, gap.greedy)
    finally:
        stage.close()
    figures.add(
        {
            f"logprob_adapter_{family}": 1e6 * worst,
            f"greedy_other_adapter_{family}": other,
        }
    )


def difference(here: Sequence[FinishedRequest], anew: Sequence[FinishedRequest]) -> float:
    """Largest log-probability difference of two engines' greedy completions; infinite where their
    tokens differ."""
    worst = 0.0
    for one, other in zip(here, anew, strict=True):
        [left], [right] = one.completions, other.completions
        if not np.array_equal(left.token_ids, right.token_ids):
            return float("inf")
        worst = max(worst, float(np.abs(left.logprobs - right.logprobs).max()))
    return worst


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--only", choices=FAMILIES, help="one family")
    options = options_of.parse_args(arguments)
    families = [options.only] if options.only else list(FAMILIES)
    layouts = None
    if options.smoke:
        families, layouts = list(SMOKE), 3
    figures = Figures("parity", options.out)
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            measure(family, Path(folder), layouts, figures)
            measure_adapter(family, Path(folder), layouts, figures)
    worst = [value for name, value in figures.values.items() if name.startswith("logprob_")]
    figures.add({"families": len(families), "logprob_worst": max(worst)})
    figures.write()


if __name__ == "__main__":
    main()
