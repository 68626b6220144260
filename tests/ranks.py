"""Learner ranks as processes of a test module, since DeepSpeed's process group is for life.

A module that uses this ends with ``if __name__ == "__main__": rank_main(work)``; ranks leave their
results in files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from avatar_rl.cluster.services.services import CPU_ENVIRONMENT, ENVIRONMENT, free_port
from avatar_rl.learner.engine import init_distributed

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, folder: Path, ranks: int, *, timeout_s: float = 280) -> None:
    """Run ``python -m module FOLDER RANK RANKS PORT`` once per rank and wait; a failed rank's log
    is in the error."""
    port = free_port()
    environment = {**os.environ, **ENVIRONMENT, **CPU_ENVIRONMENT}
    command = [sys.executable, "-m", module, str(folder)]
    logs = [folder / f"rank-{ranks}-{rank}.log" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(port)],
            cwd=ROOT,
            env=environment,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)


def rank_main(work: Callable[[Path, int, int], dict[str, Any]]) -> None:
    """What such a process does: meet the others, then ``work(folder, rank, ranks)``; its results
    are saved by name."""
    folder, rank, ranks, port = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    init_distributed(on_gpu=False, timeout=timedelta(seconds=120))
    for name, found in work(folder, rank, ranks).items():
        torch.save(found, folder / f"{name}-{ranks}-{rank}.pt")


def rank_results(folder: Path, name: str, ranks: int, rank: int = 0) -> dict[str, Any]:
    """What ``work`` of one rank returned under ``name``."""
    return torch.load(folder / f"{name}-{ranks}-{rank}.pt", weights_only=False)
