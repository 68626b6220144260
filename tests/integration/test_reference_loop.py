"""The whole real stack at staleness 0 trains what one plain loop in one process trains, on the same seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cluster.services import CPU_ENVIRONMENT, ENVIRONMENT
from prompts.record import Prompt
from prompts.synthetic.config import WorldConfig
from prompts.synthetic.world import synthesize
from prompts.tiny_model import build_tiny_omni
from rewards.record import Completion

STEPS = 6
ROOT = Path(__file__).parents[2]


def letters_reward(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
    """Varies within every group of a policy that knows nothing: length of the text modulo 5, in quarters."""
    return [len(completion.text) % 5 / 4 for completion in completions]


def recipe(folder: Path) -> dict[str, Any]:
    """Replay from the second step on, hints from the second visit on, KL, TAS, clipping and warm-up all act."""
    return {
        "name": "reference",
        "seed": 5,
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "world" / "train.jsonl"),
            "template": {"min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 256},
        },
        "loop": {"steps": STEPS, "prompts_per_step": 4, "fresh": 2, "replayed": 2, "max_staleness": 0},
        "rollout": {
            "workers": 1,
            "max_sequences": 16,
            "engine": {"max_model_len": 320, "max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20},
            "sampling": {"max_tokens": 24},
        },
        "rewards": {"weights": {"tests.integration.test_reference_loop:letters_reward": 1.0, "accuracy": 0.0}},
        "buffer": {"warm_up": 16, "capacity": 24, "hints": {"zero_patience": 1}},
        "learner": {
            "objective": {"beta": 0.1, "tas_lambda": 0.3},
            "optimizer": {"lr": 5.0e-4, "max_grad_norm": 0.5},
            "warmup": 0.5,
            "micro_batch_tokens": 512,
        },
        "probe": {"prompts": 2},
        "output": {"folder": str(folder / "runs"), "cache": str(folder / "cache"), "samples_every": 0, "report": False},
        "screen": "plain",
    }


def launch(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **ENVIRONMENT, **CPU_ENVIRONMENT}
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file)


def wait(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        process.wait(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(timeout=30)
    assert process.returncode == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of the model, the real run and the reference loop."""
    folder = tmp_path_factory.mktemp("reference")
    build_tiny_omni(folder / "model")
    synthesize(folder / "world", WorldConfig(n_train=16, n_heldout=1, n_sft=1))
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(folder)))
    logs = [folder / "run.log", folder / "reference.log"]
    processes = [
        launch(["cluster.cli", "train", str(file)], logs[0]),
        launch(["tests.reference_loop", str(file), str(folder / "reference")], logs[1]),
    ]
    for process, log in zip(processes, logs, strict=True):
        wait(process, log)
    [run] = (folder / "runs").iterdir()
    return folder / "model", run, folder / "reference"
