"""B6: weights from one process to another on the same GPU, and adapters that an engine changes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatar_rl.actors.config import EngineConfig
from avatar_rl.actors.engine.engine import RolloutEngine
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.record import Prompt
from benchmarks.gpu_blocks.generation import Sizes as EngineSizes
from benchmarks.gpu_blocks.generation import prompts, run, speed
from benchmarks.gpu_blocks.models import OMNI_3B, DecoderSize, random_omni
from benchmarks.gpu_blocks.report import Report
from tests.tiny_models import ArrayLoader

VERSIONS = 3
GREEDY_TOKENS = 32


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    model: DecoderSize | None = OMNI_3B
    bytes: int = 2 << 30  # handed from process to process
    rank: int = 32


TINY = Sizes(None, 1 << 20, 4)


def measure(report: Report, sizes: Sizes) -> None:
    """All of B6."""
    with report.part("between processes"):
        report.figures.add(handed(sizes.bytes, report.device))
    if report.on_gpu:
        with report.part("adapters"):
            report.figures.add(adapters(report, sizes))


def handed(size: int, device: torch.device) -> dict[str, float]:
    """A tensor by its handle (CUDA IPC; shared memory on a CPU): the other process copies it and
    sums it up."""
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    worker = context.Process(target=_take, args=(inbox, outbox), daemon=True)
    worker.start()
    try:
        values = torch.arange(size // 4, dtype=torch.int32, device=device) % 1000
        expected, spent = int(values.long().sum()), []
        for _ in range(4):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            inbox.put(values)
            total = outbox.get(timeout=120)
            spent.append(time.perf_counter() - start)
            if total != expected:
                raise SystemExit(f"the other process saw {total} instead of {expected}")
        inbox.put(None)
        worker.join(60)
    finally:
        worker.kill()
    fastest = min(spent[1:])
    return {"handed_ms": 1000 * fastest, "handed_gb_per_s": size / fastest / 1e9}


def _take(inbox: Any, outbox: Any) -> None:
    while (values := inbox.get()) is not None:
        copy = values.clone()
        outbox.put(int(copy.long().sum()))
        del values, copy


def random_adapter(folder: Path, rank: int, seed: int) -> dict[str, Tensor]:
    """On every projection of the language model, as the learner publishes it."""
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(seed)
    found = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        for name in names:
            if name.startswith("thinker.model.") and name.endswith("proj.weight"):
                outputs, inputs = file.get_slice(name).get_shape()
                layer = name.removesuffix(".weight")
                a = torch.randn(rank, inputs, generator=generator) * 0.02
                b = torch.randn(outputs, rank, generator=generator) * 0.02
                found |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    return found


def swaps(
    engine: RolloutEngine,
    encoder: PromptEncoder,
    asked: Sequence[Prompt],
    versions: Sequence[dict[str, Tensor]],
) -> dict[str, float]:
    """Milliseconds until an engine has another adapter, and whether the first one, taken again,
    gives the tokens it gave."""
    from avatar_rl.actors.config import RequestSampling

    greedy = RequestSampling(temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
    spent, said = [], []
    for weights in (*versions, versions[0]):
        start = time.perf_counter()
        engine.adopt(engine.version + 1, weights.items())
        spent.append(time.perf_counter() - start)
        done = run(engine, encoder, asked, greedy)
        said.append([done[prompt.id].completions[0].token_ids for prompt in asked])
    again = all(np.array_equal(a, b) for a, b in zip(said[0], said[-1], strict=True))
    return {"adapter_swap_ms": 1000 * float(np.median(spent)), "adapter_again": float(again)}


def adapters(report: Report, sizes: Sizes) -> dict[str, float]:
    """An engine with adapters: their change, and its speed."""
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = random_omni(Path(name) / "model", sizes.model, report.device)
        loader, of_engine = ArrayLoader(), EngineSizes()
        encoder = PromptEncoder(folder, loader, TemplateConfig())
        asked = prompts(loader, of_engine, 16)
        config = EngineConfig(max_model_len=of_engine.longest, max_num_seqs=64)
        versions = [random_adapter(folder, sizes.rank, seed) for seed in range(VERSIONS)]
        layers = {name.split(".lora_")[0].rpartition(".")[2] for name in versions[0]}
        shape = AdapterShape(sizes.rank, 2.0 * sizes.rank, False, tuple(sorted(layers)))
        engine = RolloutEngine(folder, config, adapter=shape)
        try:
            found = swaps(engine, encoder, asked[:4], versions)
            found["tokens_per_s_64_adapter"] = speed(engine, encoder, asked, of_engine.tokens)
        finally:
            engine.close()
    return found
