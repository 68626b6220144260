"""B1: the vision tower, the log-prob head, a pack against copied prompts, FlexAttention. torch and
transformers alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rl.learner.batch.microbatch import Tree
from avatar_rl.learner.model.attention import PackMask
from avatar_rl.learner.model.head import TiledHead
from benchmarks.gpu_blocks.models import OMNI_3B, OMNI_7B, TINY_TOWER, TOWER, dtype_on, made_on
from benchmarks.gpu_blocks.report import Report
from benchmarks.head_side import chunk_scores
from benchmarks.packed_side import (
    AVATAR,
    GRPO,
    CopiedSide,
    ModelSize,
    PackedSide,
    build_vision_model,
    make_rows,
)

OMNI_3B_MODEL = ModelSize(
    OMNI_3B.hidden,
    OMNI_3B.layers,
    OMNI_3B.heads,
    OMNI_3B.pairs,
    OMNI_3B.mlp,
    OMNI_3B.vocabulary,
    (16, 24, 24),
)
GROUP = Tree(0, 6000, (500,) * 8)


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    tower: dict[str, Any] = field(default_factory=lambda: TOWER)
    out: int = OMNI_7B.hidden
    grid: tuple[int, int, int] = (28, 32, 64)  # steps, patches: 14,336 tokens
    vocabulary: int = OMNI_7B.vocabulary
    width: int = OMNI_7B.hidden
    head_tokens: int = 8192
    model: ModelSize = OMNI_3B_MODEL
    scale: float = 5.5  # prompts of 5,500 tokens, completions of 550
    copied_rows: tuple[int, ...] = (1, 2)
    tree: Tree = GROUP
    heads: tuple[int, int, int] = (28, 4, 128)  # queries, keys and values, width


TINY = Sizes(
    tower=TINY_TOWER,
    out=64,
    grid=(2, 8, 8),
    vocabulary=500,
    width=64,
    head_tokens=600,
    model=ModelSize(),
    scale=0.1,
    copied_rows=(4,),
    tree=Tree(0, 40, (10, 7)),
    heads=(4, 2, 32),
)


def measure(report: Report, sizes: Sizes) -> None:
    """All of B1."""
    for attention in ("sdpa", "flash_attention_2"):
        if attention == "sdpa" or report.on_gpu:
            with report.part(f"tower {attention}"):
                report.figures.add(tower(report, sizes, attention))
    with report.part("head"):
        report.figures.add(head(report, sizes))
    with report.part("pack"):
        report.figures.add(pack(report, sizes))
    with report.part("flex attention"):
        report.figures.add(flex(report, sizes))


@torch.no_grad()
def tower(report: Report, sizes: Sizes, attention: str) -> dict[str, float]:
    """One video through the frozen tower."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as code

    config = code.Qwen2_5_VLVisionConfig(
        **sizes.tower, out_hidden_size=sizes.out, attn_implementation=attention
    )
    with made_on(report.device, dtype_on(report.device)):
        made = code.Qwen2_5_VisionTransformerPretrainedModel(config).eval()
        steps, height, width = sizes.grid
        patches = torch.randn(steps * height * width, 3 * 2 * 14 * 14, dtype=made.dtype)
        grid = torch.tensor([sizes.grid])
    spent = report.seconds(lambda: made(patches, grid_thw=grid))
    tokens = steps * height * width // 4
    return {
        f"tower_ms_{attention}": 1000 * spent,
        f"tower_tokens_per_s_{attention}": tokens / spent,
    }


def head(report: Report, sizes: Sizes) -> dict[str, float]:
    """Forward and backward of the log-prob head: tiled, and 2,048 tokens of plain autograd."""
    dtype = dtype_on(report.device)
    torch.manual_seed(0)
    with torch.device(report.device):
        layer = nn.Linear(sizes.width, sizes.vocabulary, bias=False, dtype=dtype)
        states = torch.randn(sizes.head_tokens, sizes.width, dtype=dtype, requires_grad=True)
        tokens = torch.randint(0, sizes.vocabulary, (sizes.head_tokens,))
        temperature = torch.ones(sizes.head_tokens)
    tiled = TiledHead(layer, None)

    def plain() -> Tensor:
        parts = [
            chunk_scores(layer, *(x[i : i + 2048] for x in (states, tokens, temperature)))[0]
            for i in range(0, sizes.head_tokens, 2048)
        ]
        return torch.cat(parts)

    def clear() -> None:
        states.grad = layer.weight.grad = None

    def timed(scores: Callable[[], Tensor]) -> tuple[float, float]:
        def run() -> None:
            scores().sum().backward()
            clear()

        return report.seconds(run), report.peak(run)

    scores: dict[str, Callable[[], Tensor]] = {
        "tiled": lambda: tiled(states, tokens, temperature)[0],
        "plain": plain,
    }
    gap = float((scores["tiled"]() - scores["plain"]()).abs().max().detach())
    found = {"head_gap": gap}
    for name, run in scores.items():
        spent, peak = timed(run)
        found |= {f"head_ms_{name}": 1000 * spent, f"head_peak_gib_{name}": peak}
    return found


def pack(report: Report, sizes: Sizes) -> dict[str, float]:
    """Seconds of copied prompts over those of a pack, at the decoder of a 3B model."""
    dtype = str(dtype_on(report.device)).removeprefix("torch.")
    place = {"device": str(report.device), "dtype": dtype}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = build_vision_model(Path(name), sizes.model, **place)
        for shape in (GRPO, AVATAR):
            rows = make_rows(shape, scale=sizes.scale, width=sizes.model.width)
            packed = PackedSide(folder, rows, budget=65_536, **place)
            spent = report.seconds(packed.seconds, rounds=3)
            found[f"packed_s_{shape.name}"] = spent
            loss, _ = packed.gradients()
            del packed
            best = float("inf")
            for count in sizes.copied_rows:
                copied = CopiedSide(folder, rows, count, **place)
                best = min(best, report.seconds(copied.seconds, rounds=3))
                other, _ = copied.gradients()
                del copied
            found[f"packed_vs_copied_{shape.name}"] = best / spent
            found[f"packed_loss_gap_{shape.name}"] = abs(loss - other)
    return found


def flex(report: Report, sizes: Sizes) -> dict[str, float]:
    """One layer's attention over a pack: FlexAttention with the pack's block mask, and sdpa with
    the same mask, dense. Backward on a GPU only."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention
    from transformers import masking_utils

    queries, pairs, width = sizes.heads
    mask = PackMask((sizes.tree,), masking_utils.causal_mask_function, True, report.device)
    size, dtype = mask.positions, dtype_on(report.device)
    torch.manual_seed(0)
    with torch.device(report.device):
        shapes = ((1, queries, size, width), (1, pairs, size, width), (1, pairs, size, width))
        q, k, v = (torch.randn(s, dtype=dtype, requires_grad=report.on_gpu) for s in shapes)
    blocks = mask.block_mask
    dense = create_mask(blocks.mask_mod, None, None, size, size, device=str(report.device))
    kernel: Callable[..., Any] = flex_attention
    if report.on_gpu:
        kernel = torch.compile(flex_attention)
    ways: dict[str, Callable[[], Tensor]] = {
        "flex": lambda: kernel(q, k, v, block_mask=blocks, enable_gqa=True),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True),
    }
    gap = (ways["flex"]() - ways["sdpa"]()).abs().max()
    found = {"flex_gap": float(gap.detach()), "flex_positions": float(size)}

    def both(run: Callable[[], Tensor]) -> None:
        output = run()
        if report.on_gpu:
            output.sum().backward()

    for name, run in ways.items():
        found[f"attention_ms_{name}"] = 1000 * report.seconds(lambda run=run: both(run))  # type: ignore[misc]
    return found
