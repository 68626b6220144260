"""What the blocks for one GPU stand on, on a CPU: their random checkpoints and their watch over a
run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from benchmarks.gpu_blocks import generation, models, turns
from tests.tiny_models import ArrayLoader

CPU = torch.device("cpu")
#: Writes four rows of metrics, the third again as a run does that went back to its checkpoint.
RUN = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]) / "run"
folder.mkdir(parents=True)
for step in (0, 1, 2, 2, 3)[: int(sys.argv[2])]:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time/step": 0.5 + step}) + chr(10))
    time.sleep(0.3)
sys.exit(int(sys.argv[3]))
"""


def test_a_random_omni_of_another_size_is_one_checkpoint(tmp_path: Path) -> None:
    folder = models.random_omni(
        tmp_path / "model", models.TINY, CPU, tower=models.TINY_TOWER, ears=models.TINY_EARS
    )
    loader = ArrayLoader()
    encoder = PromptEncoder(folder, loader, TemplateConfig())
    policy = generation.policy_of(folder, CPU)
    for prompt in generation.prompts(loader, generation.TINY, 4):
        tokens = np.array([5, 6, 7], dtype=np.int32)
        encoded = encoder.encode(prompt, False)
        with torch.no_grad():
            found = policy(collate([Row((prompt.id, False), encoded, tokens)])).logprobs
        assert found.shape == (1, 3) and bool((found < 0).all())


def test_the_watch_counts_steps_and_says_why_a_run_failed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path / "a" / "runs")]
    (tmp_path / "a").mkdir()
    found = turns.watched([*command, "5", "0"], tmp_path / "a" / "runs", steps=4, kill_after=9)
    assert (found["turns_steps"], found["turns_lost_steps"], found["turns_killed"]) == (5, 0, 0)
    assert found["turns_step_s"] == 2.5
    (tmp_path / "b").mkdir()
    command = [*command[:-1], str(tmp_path / "b" / "runs")]
    with pytest.raises(SystemExit, match="ended with 3"):
        turns.watched([*command, "1", "3"], tmp_path / "b" / "runs")


def test_an_actor_is_found_by_its_title_and_killed() -> None:
    assert turns.kill(os.getpid()) == 0
    with subprocess.Popen(["ray::RolloutActor.run", "60"], executable="/bin/sleep") as actor:
        assert turns.kill(os.getpid()) == 1
        assert actor.wait(10) == -signal.SIGKILL
