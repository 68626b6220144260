"""B5: ten steps of the one-GPU recipe, engine and learner by turns, with one actor killed on the
way. The run is `avatar train` itself, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.gpu_blocks.models import OMNI_3B, random_omni
from benchmarks.gpu_blocks.report import Report

RECIPE = Path("recipes/gpu/smoke_1gpu.yaml")
STEPS, KILL_AFTER = 10, 4
DEADLINE_S = 480.0
#: How Ray calls the process that is killed.
VICTIM = "ray::RolloutActor"


def measure(report: Report) -> None:
    """All of B5. It needs the recipe and a GPU."""
    if not RECIPE.is_file():
        raise FileNotFoundError(f"{RECIPE} is not here: run this from the repository's root")
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = Path(name)
        model = random_omni(folder / "model", OMNI_3B, report.device)
        command = [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(RECIPE)]
        command += ["--model.path", str(model), "--loop.steps", str(STEPS), "--screen", "plain"]
        command += [
            "--output.folder",
            str(folder / "runs"),
            "--output.cache",
            str(folder / "cache"),
        ]
        # A random model ends no turn and earns nothing: whether it runs is what is seen here.
        command += ["--output.export", "false", "--checkpoint.every", "2"]
        report.figures.add(watched(command, folder / "runs"))


def watched(
    command: Sequence[str], runs: Path, *, steps: int = STEPS, kill_after: int = KILL_AFTER
) -> dict[str, float]:
    """Run ``command`` to its end, kill one rollout actor after some steps, and read what the run
    left. Raises SystemExit with the end of its output when it fails."""
    began = time.perf_counter()
    log = runs.parent / "train.log"
    killed = 0
    with log.open("wb") as output:
        run = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while run.poll() is None:
                if time.perf_counter() - began > DEADLINE_S:
                    raise SystemExit(f"no end after {DEADLINE_S:g} s:\n{_end(log)}")
                if not killed and len(rows(runs)) >= kill_after:
                    killed = kill(run.pid)
                time.sleep(0.5)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGTERM)
                run.wait(60)
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}:\n{_end(log)}")
    found = rows(runs)
    seconds = [row["time/step"] for row in found if "time/step" in row]
    figures = {
        "turns_steps": float(len(found)),
        "turns_killed": float(killed),
        "turns_lost_steps": float(steps - len({row["step"] for row in found})),
        "turns_total_s": time.perf_counter() - began,
    }
    return figures | ({"turns_step_s": median(seconds)} if seconds else {})


def rows(runs: Path) -> list[dict[str, Any]]:
    """Metrics of the only run, a row for each step that has ended."""
    files = sorted(runs.glob("*/metrics.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill(pid: int) -> int:
    """SIGKILL to one rollout actor below the run; 1 when there was one."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith(VICTIM):
            process.send_signal(signal.SIGKILL)
            return 1
    return 0


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
