"""TRL's side of benchmarks/loop.py, as it is started: trl_loop_side.py in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rl.learner.config import OptimizerConfig
from benchmarks.loops.tasks import GROUP, Task

UNCOUNTED = 1  # the first step allocates and warms up


@dataclass(frozen=True)
class TrlRun:
    """Its steps: wall and processor seconds, mean reward, mean length of the completions."""

    steps: list[dict[str, float]]
    prompt_ids: list[int]  # of the first row

    @property
    def seconds(self) -> float:
        return float(np.mean([step["seconds"] for step in self.steps[UNCOUNTED:]]))

    @property
    def core_seconds(self) -> float:
        return float(np.mean([step["cpu"] for step in self.steps[UNCOUNTED:]]))

    def rewards(self) -> list[tuple[float, float]]:
        """(seconds since training began, mean reward) by step."""
        ends = np.cumsum([step["seconds"] for step in self.steps])
        return [(float(end), step["reward"]) for end, step in zip(ends, self.steps, strict=True)]


def job(task: Task, *, rows: int, steps: int, threads: int, beta: float) -> dict[str, Any]:
    """What trl_loop_side.py reads; ``rows`` is the micro-batch, in completions. Optimiser and
    clipping are the recipe's defaults."""
    optimizer = OptimizerConfig()
    return {
        "model": str(task.model),
        "rows_file": str(task.rows),
        "image": task.image,
        "reward": task.reward_name,
        "prompts": task.prompts,
        "tokens": task.tokens,
        "fixed": task.fixed,
        "seed": task.seed,
        "lr": task.lr,
        "rows": min(rows, task.prompts * GROUP),
        "steps": steps,
        "threads": threads,
        "beta": beta,
        "epsilon": 0.2,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "until": None,
        "window": 1,
    }


def train(settings: dict[str, Any], folder: Path) -> TrlRun:
    """Raises SystemExit with the end of its output when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps(settings | {"scratch": str(folder / "scratch")}))
    command = [sys.executable, "-m", "benchmarks.loops.trl_loop_side", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"TRL's run ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    found = json.loads(path.with_suffix(".steps.json").read_text())
    return TrlRun(found["steps"], found["prompt_ids"])
