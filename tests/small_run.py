"""A run of a few clips as a user starts it, and what must be left after one: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from avatar_rl.cluster.checkpoints.checkpoint import newest_checkpoint
from avatar_rl.cluster.telemetry.run_files import read_status

#: The cold-started tiny model that comes along: what trains one is in test_curriculum_run.py.
MODEL = Path(__file__).parents[1] / "recipes" / "assets" / "tiny_omni"
RECIPE = f"""
name: small
preset: avatar
model: {{path: {MODEL}}}
data:
  synthetic: {{n_train: 12, n_heldout: 6, n_sft: 0}}
  template: {{min_pixels: 784, max_pixels: 50176, max_prompt_tokens: 256}}
loop: {{steps: 3, prompts_per_step: 4, max_staleness: 1}}
rollout:
  workers: 2
  max_sequences: 16
  engine: {{max_model_len: 320, max_num_seqs: 16, kv_cache_memory_bytes: 67108864}}
  sampling: {{max_tokens: 16}}
learner:
  ranks: 2
  micro_batch_tokens: 1500
  objective: {{beta: 0.05}}
  optimizer: {{lr: 1.0e-4, zero_stage: 2, freeze: [visual, audio_tower]}}
  embeddings: {{workers: 0}}  # a process a rank more would be felt on two cores
buffer: {{warm_up: 8}}
evaluation: {{every: 2}}
output: {{samples_every: 1}}
screen: plain
"""


def start(folder: Path, *overrides: str, cache: Path | None = None) -> subprocess.Popen[str]:
    """`avatar train` of the small recipe in a session of its own; without ``cache`` it makes world
    and model anew."""
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(folder / "recipe.yaml")]
    places = [
        "--output.folder",
        str(folder / "runs"),
        "--output.cache",
        str(cache or folder / "cache"),
    ]
    return subprocess.Popen(
        [*command, *places, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
        # A test suite in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def left_over(session: int) -> list[str]:
    """Command lines of processes that still belong to a session."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if os.getsid(process.pid) == session:
                found.append(" ".join(process.info["cmdline"] or []))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def until_freed(before: set[str]) -> None:
    """No shared memory is left that nobody alive uses; what other tests use at the same time is
    theirs."""
    deadline = time.monotonic() + 20
    while leaked := set(os.listdir("/dev/shm")) - before - in_use():
        assert time.monotonic() < deadline, f"left in /dev/shm: {leaked}"
        time.sleep(0.2)


def in_use() -> set[str]:
    """Names in /dev/shm that a living process has mapped or open."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            places = [
                line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()
            ]
            places += [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # it has just ended
            continue
        found |= {Path(place.strip()).name for place in places if place.startswith("/dev/shm/")}
    return found


def assert_ended_in_order(process: subprocess.Popen[str], run: Path, before: set[str]) -> None:
    """An interrupted run is saved; no process of its session and nothing in /dev/shm (``before``
    its start) is left."""
    deadline = time.monotonic() + 20
    while left_over(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_over(process.pid) == []
    until_freed(before)
    assert read_status(run).state == "interrupted"
    assert newest_checkpoint(run, pytest.fail) is not None
