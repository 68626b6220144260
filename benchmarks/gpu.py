"""Six blocks on one GPU, each under ten minutes, on random weights of real size that are made
there -> build/bench/gpu_b1.json and so on, with the versions they ran on:

    make bench NAME=gpu ARGS=b1            # one block, or several: ARGS="b1 b4"
    make bench NAME=gpu ARGS=--smoke       # on a CPU: what needs no GPU of b1 and b4, tiny

b1  vision tower, log-prob head, a pack against copied prompts, FlexAttention
b2  Omni-3B engine: tokens a second, adoptions that leave nothing stale, chunked prefill
b3  how far bfloat16 moves an engine's log-probabilities from the learner's
b4  7B learner with LoRA: tokens a second, share of the peak, memory, publication
b5  ten steps of recipes/gpu/smoke_1gpu.yaml, engine and learner by turns, one kill
b6  weights between processes by CUDA IPC, change of adapters

What an older vLLM, torch or transformers lacks is left out and said. docs/benchmarks.md says how
to read the figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.gpu_blocks import generation, kernels, training, transfer, turns
from benchmarks.gpu_blocks.report import Report
from benchmarks.harness import Figures, parser

BLOCKS: dict[str, tuple[str, Callable[[Report], None]]] = {
    "b1": ("the kernels of the learner", lambda report: kernels.measure(report, kernels.Sizes())),
    "b2": (
        "the engine's speed and its adoptions",
        lambda report: generation.measure(report, generation.Sizes()),
    ),
    "b3": (
        "the mismatch of bfloat16",
        lambda report: generation.measure(report, generation.Sizes(), only_mismatch=True),
    ),
    "b4": ("a learner of 7B", lambda report: training.measure(report, training.Sizes())),
    "b5": ("engine and learner by turns", turns.measure),
    "b6": (
        "weights between processes",
        lambda report: transfer.measure(report, transfer.Sizes()),
    ),
}


def smoke(out: Path) -> None:
    """What needs no GPU, at tiny sizes on a CPU. The engine's functions run in the tests of the
    engine."""
    torch.set_num_threads(1)
    report = Report(Figures("gpu", out), "cpu", strict=True)
    kernels.measure(report, kernels.TINY)
    training.measure(report, training.SMALL)
    transfer.measure(report, transfer.TINY)
    report.figures.write()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("blocks", nargs="*", help=f"which of {', '.join(BLOCKS)}")
    chosen = options.parse_args(arguments)
    if unknown := [name for name in chosen.blocks if name not in BLOCKS]:
        options.error(f"no block {unknown[0]}: choose from {', '.join(BLOCKS)}")
    disable_progress_bar()
    if chosen.smoke:
        smoke(chosen.out)
        return
    if not chosen.blocks:
        sys.exit(f"name a block: {', '.join(BLOCKS)}; or --smoke")
    if not torch.cuda.is_available():
        for name in chosen.blocks:
            print(
                f"{name}: {BLOCKS[name][0]} can only be measured on an NVIDIA GPU, and torch "
                "sees none",
                file=sys.stderr,
            )
        sys.exit(1)
    if len(chosen.blocks) > 1:  # each with a GPU that nothing else has touched
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(chosen.out)]
        codes = [subprocess.run([*command, name]).returncode for name in chosen.blocks]
        sys.exit(max(codes))
    [name] = chosen.blocks
    report = Report(Figures(f"gpu_{name}", chosen.out), "cuda", strict=False)
    BLOCKS[name][1](report)
    report.write()


if __name__ == "__main__":
    main()
