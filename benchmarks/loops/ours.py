"""Our side of benchmarks/loop.py: a run as a user starts it, and its steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from avatar_rl.cluster.recipe.overlays import merge
from avatar_rl.cluster.telemetry.run_files import read_metrics
from benchmarks.loops.tasks import GROUP, HEIGHT, WIDTH, Task

ROOT = Path(__file__).parents[2]
POLL_S = 0.5
#: First steps of a run that no rate counts: engines and heaps warm up, the pipeline fills.
UNCOUNTED = 2


def recipe(task: Task, *, steps: int, replayed: int, beta: float) -> dict[str, Any]:
    """What TRL is given, in our keys: groups of eight, ``replayed`` of them old."""
    template: dict[str, Any] = {"max_prompt_tokens": 192}
    if task.image:
        template = {
            "max_prompt_tokens": 448,
            "min_pixels": 56 * 56,
            "max_pixels": WIDTH * HEIGHT,
        }
    return {
        "name": "loop",
        "seed": task.seed,
        "preset": "grpo",
        "model": {"path": str(task.model)},
        "data": {"train": str(task.rows), "template": template},
        "loop": {
            "steps": steps,
            "prompts_per_step": task.prompts,
            "fresh": GROUP - replayed,
            "replayed": replayed,
            "max_staleness": 1,
        },
        "rollout": {
            "max_sequences": 64,
            "engine": {
                "max_model_len": 512,
                "max_num_seqs": 64,
                "max_num_batched_tokens": 4096,
                "kv_cache_memory_bytes": 64 << 20,
            },
            "sampling": {"max_tokens": task.tokens, "ignore_eos": task.fixed},
        },
        "rewards": {"weights": {task.reward: 1.0}},
        "buffer": {"warm_up": 0},
        "learner": {
            "schedule": "constant",
            "warmup": 0.0,
            "objective": {"beta": beta, "loss_type": "grpo"},
            "optimizer": {"lr": task.lr, "dtype": "float32"},
        },
        "evaluation": {"every": 0},
        "checkpoint": {"every": 0},
        "probe": {"prompts": 0},
        "output": {"samples_every": 0, "export": False, "report": False},
        "screen": "plain",
    }


@dataclass(frozen=True)
class OurRun:
    """What is kept of a run: its steps' metrics, and processor seconds of all its processes by wall
    time."""

    rows: list[dict[str, Any]]
    clock: list[tuple[float, float]]  # (time, processor seconds so far)

    @property
    def counted(self) -> list[dict[str, Any]]:
        return self.rows[UNCOUNTED:]

    @property
    def seconds(self) -> float:
        """Wall seconds of an update, from the end of one step to that of the next."""
        first, last = self.rows[UNCOUNTED - 1], self.rows[-1]
        return (last["timestamp"] - first["timestamp"]) / len(self.counted)

    @property
    def core_seconds(self) -> float:
        """Processor seconds of an update, all processes together."""
        first, last = self.rows[UNCOUNTED - 1], self.rows[-1]
        times, spent = zip(*self.clock, strict=True)
        began, ended = np.interp([first["timestamp"], last["timestamp"]], times, spent)
        return float(ended - began) / len(self.counted)

    def mean(self, name: str) -> float:
        return float(np.mean([row.get(name) or 0.0 for row in self.counted]))

    def rewards(self) -> list[tuple[float, float]]:
        """(seconds since training began, mean reward of the fresh completions) by step."""
        if not self.rows:
            return []
        began = self.rows[0]["timestamp"] - self.rows[0]["time/step"]
        return [(row["timestamp"] - began, row["reward/mean"]) for row in self.rows]


def train(
    raw: dict[str, Any], folder: Path, *, until: Callable[[OurRun], bool] | None = None
) -> OurRun:
    """A run in processes of its own, stopped early once ``until`` says so. Raises SystemExit with
    the end of its output when it fails."""
    shutil.rmtree(folder / "runs", ignore_errors=True)  # of the run before
    folder.mkdir(parents=True, exist_ok=True)
    raw = merge(raw, {"output": {"folder": str(folder / "runs"), "cache": str(folder / "cache")}})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the reward is a module of this one
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        clock, stopped = Clock(process.pid), False
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                if until is not None and not stopped and until(OurRun(steps_of(folder), [])):
                    stopped = True
                    process.terminate()
        finally:  # an interrupted benchmark leaves no run behind
            if process.poll() is None:
                process.terminate()
                process.wait()
            clock.stop()
    if process.returncode and not stopped:
        text = (folder / "output.txt").read_text()
        raise SystemExit(f"our run ended with {process.returncode}:\n{text[-3000:]}")
    return OurRun(steps_of(folder), clock.read)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Metrics of the newest run's steps so far."""
    runs = [run for run in (folder / "runs").glob("*") if (run / "metrics.jsonl").is_file()]
    if not runs:
        return []
    newest = max(runs, key=lambda run: run.stat().st_ctime)
    return [row for row in read_metrics(newest) if row.get("time/step") is not None]


class Clock:
    """Processor seconds of a session's processes, read twice a second."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.read: list[tuple[float, float]] = []
        self._spent: dict[int, float] = {}  # of processes that have ended, too
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            for process in psutil.process_iter():
                try:
                    if os.getsid(process.pid) == self.session:
                        times = process.cpu_times()
                        self._spent[process.pid] = times.user + times.system
                except (OSError, psutil.Error):
                    continue
            self.read.append((time.time(), sum(self._spent.values())))
