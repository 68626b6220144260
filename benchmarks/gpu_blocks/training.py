"""B4: a step of a 7B learner with LoRA on one GPU: tokens a second, share of the peak arithmetic,
memory, and what a publication takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.batch.microbatch import MicroBatch, Row, collate
from avatar_rl.learner.batch.packing import Size, pack
from avatar_rl.learner.config import OptimizerConfig
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.model.load import recompute_activations
from avatar_rl.learner.model.policy import Policy, PolicyOutput
from avatar_rl.prompts.encoding.template import EncodedPrompt
from benchmarks.gpu_blocks.models import OMNI_7B, TINY, DecoderSize, dtype_on, text_model
from benchmarks.gpu_blocks.report import Report
from benchmarks.learner_side import join_alone

#: Peak bfloat16 arithmetic without sparsity, by a word of the GPU's name (its data sheet).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass(frozen=True)
class Sizes:
    """One step: ``prompts`` groups of eight."""

    model: DecoderSize = OMNI_7B
    prompts: int = 4
    prompt: int = 6000
    completion: int = 500
    budget: int = 32_768
    rank: int = 32
    rounds: int = 3


SMALL = Sizes(TINY, 2, 40, 8, 256, 4, 1)


def rows(sizes: Sizes) -> list[Row]:
    """Eight completions of each prompt."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(sizes.prompts):
        ids = torch.from_numpy(rng.integers(2, 4000, sizes.prompt))
        prompt = EncodedPrompt(ids, torch.arange(sizes.prompt)[None], sizes.prompt)
        for _ in range(8):
            tokens = rng.integers(2, 4000, sizes.completion).astype(np.int32)
            found.append(Row((str(number), False), prompt, tokens))
    return found


def packs(asked: list[Row], budget: int) -> list[MicroBatch]:
    sizes = [Size(row.key, len(row.prompt.input_ids), len(row.token_ids)) for row in asked]
    return [collate([asked[i] for i in indices]) for indices in pack(sizes, budget)]


def measure(report: Report, sizes: Sizes) -> None:
    """All of B4."""
    join_alone(on_gpu=report.on_gpu)
    model = text_model(sizes.model, report.device)
    recompute_activations(model)
    adapter = Adapter.attach(model, LoraConfig(rank=sizes.rank, alpha=2.0 * sizes.rank))
    dtype = str(dtype_on(report.device)).removeprefix("torch.")
    policy = Policy(model).to(report.device)
    engine = TrainEngine(
        policy, OptimizerConfig(dtype=dtype), world_size=1, dtype=dtype, adapter=adapter
    )
    batches = packs(rows(sizes), sizes.budget)
    positions = sum(len(batch.input_ids) for batch in batches)
    completed = 8 * sizes.prompts * sizes.completion

    def loss(number: int, batch: MicroBatch, output: PolicyOutput) -> Tensor:
        return -(output.logprobs * batch.mask).sum() / completed

    def step() -> None:
        engine.accumulate(batches, loss, batches[0])
        engine.step(1e-5)

    with report.part("step"):
        peak = report.peak(step)
        spent = report.seconds(step, rounds=sizes.rounds)
        found = {
            "learner_step_s": spent,
            "learner_positions_per_s": positions / spent,
            "learner_completion_tokens_per_s": completed / spent,
            "learner_peak_gib": peak,
            "positions_saved": 8 * sizes.prompts * (sizes.prompt + sizes.completion) / positions,
        }
        report.figures.add(found | _utilisation(report, sizes, positions, spent))
    with report.part("publication"):
        report.figures.add(publication(engine))


def _utilisation(report: Report, sizes: Sizes, positions: int, spent: float) -> dict[str, float]:
    """Arithmetic of forward, its repetition and the backward through a frozen matrix (2 + 2 + 2
    operations a parameter and position; the products of attention left out) over the peak."""
    if not report.on_gpu:
        return {}
    name = torch.cuda.get_device_name()
    peak = next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)
    if peak is None:
        report.notes["left_out_mfu"] = f"no peak arithmetic known of {name}"
        return {}
    return {"learner_mfu": 6 * sizes.model.parameters * positions / spent / peak}


def publication(engine: TrainEngine) -> dict[str, float]:
    """Seconds until a version lies on the host: the adapter alone, and merged weights."""

    def taken(parts: Iterator[dict[str, Tensor]]) -> tuple[float, float]:
        start, size = time.perf_counter(), 0
        for part in parts:
            for name in part:
                size += part[name].to("cpu", copy=True).nbytes
        return time.perf_counter() - start, size / 1e6

    adapter_s, adapter_mb = taken(engine.adapter_weights())
    whole_s, whole_mb = taken(engine.whole_weights())
    return {
        "publish_adapter_s": adapter_s,
        "publish_adapter_mb": adapter_mb,
        "publish_whole_s": whole_s,
        "publish_whole_mb": whole_mb,
    }
