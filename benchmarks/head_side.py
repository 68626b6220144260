"""Peak memory of the head's forward and backward at a vocabulary of 152k: the tiled head, and the
chunk of plain autograd that was there before it. Each in a process of its own:
``python -m benchmarks.head_side tiled|chunk TOKENS``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from avatar_rl.learner.model.head import TiledHead

VOCABULARY = 152_064
WIDTH = 256


def chunk_scores(
    head: nn.Linear, states: Tensor, tokens: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of up to 2,048 tokens at once, all by autograd."""
    logits = head(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature[:, None]
    logprobs = torch.log_softmax(logits, -1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, tokens[:, None])[:, 0], entropy


def peak_bytes(which: str, tokens: int) -> int:
    """Peak memory of one forward and backward above what its inputs take, measured outside."""
    command = [sys.executable, "-m", "benchmarks.head_side", which, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _status(name: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(which: str, count: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16)
    states = torch.randn(count, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.randint(0, VOCABULARY, (count,))
    temperature = torch.ones(count)
    tiled = TiledHead(head, None)
    # The kernel's peak begins with the parent's memory: forget it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    if which == "tiled":
        logprobs, _ = tiled(states, tokens, temperature)
    else:
        logprobs, _ = chunk_scores(head, states, tokens, temperature)
    logprobs.sum().backward()
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
