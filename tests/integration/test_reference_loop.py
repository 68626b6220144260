"""The whole real stack at staleness 0 trains what one plain loop in one process trains, on the same
seed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.services.services import CPU_ENVIRONMENT, ENVIRONMENT
from avatar_rl.cluster.telemetry.run_files import read_metrics, read_status
from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from avatar_rl.prompts.synthetic.world import synthesize
from avatar_rl.rewards.record import Completion
from tests.public_set import write_daily_omni

STEPS = 6
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)  # two whole runs in one fixture


def letters_reward(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
    """Varies within every group of a policy that knows nothing: length of the text modulo 5, in
    quarters."""
    return [len(completion.text) % 5 / 4 for completion in completions]


def recipe(folder: Path) -> dict[str, Any]:
    """Replay from the second step on, hints from the second visit on, KL, TAS, clipping and warm-up
    all act."""
    return {
        "name": "reference",
        "seed": 5,
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "world" / "train.jsonl"),
            "template": {"min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 256},
        },
        "loop": {
            "steps": STEPS,
            "prompts_per_step": 4,
            "fresh": 2,
            "replayed": 2,
            "max_staleness": 0,
        },
        "rollout": {
            "workers": 1,
            "max_sequences": 16,
            "engine": {"max_model_len": 320, "max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20},
            "sampling": {"max_tokens": 24},
        },
        "rewards": {
            "weights": {
                "tests.integration.test_reference_loop:letters_reward": 1.0,
                "accuracy": 0.0,
            }
        },
        # 40 % of the capacity are for Hard prompts, which all of these are: 19 places
        "buffer": {"warm_up": 16, "capacity": 48, "hints": {"zero_patience": 1}},
        "learner": {
            "objective": {"beta": 0.1, "tas_lambda": 0.3},
            "optimizer": {
                "lr": 5.0e-4,
                "max_grad_norm": 0.5,
                "freeze": ["visual", "audio_tower"],
            },
            "warmup": 0.5,
            "micro_batch_tokens": 512,
            # The reference has neither: they must change nothing.
            "gradient_checkpointing": True,
            "embeddings": {"mode": "on", "folder": str(folder / "store")},
            "threads": 1,  # as the reference: rewards and tokens must be the very same
        },
        "probe": {"prompts": 2},
        # The reference knows nothing of public sets: they must change nothing.
        "evaluation": {
            "benchmarks": {
                "names": ["dailyomni"],
                "sets": str(folder / "sets"),
                "every": 4,
                "limit": 3,
            }
        },
        "output": {
            "folder": str(folder / "runs"),
            "cache": str(folder / "cache"),
            "samples_every": 0,
            "report": False,
        },
        "screen": "plain",
    }


def launch(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **ENVIRONMENT, **CPU_ENVIRONMENT}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file
        )


def finish(processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    """Wait for all; whatever happens, none outlives the test, and each may stop what it started."""
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=280) == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=60)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of the model, the real run and the reference loop."""
    folder = tmp_path_factory.mktemp("reference")
    build_tiny_omni(folder / "model")
    synthesize(folder / "world", WorldConfig(n_train=16, n_heldout=1, n_sft=1))
    write_daily_omni(folder / "sets" / "dailyomni", 12)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(folder)))
    logs = [folder / "run.log", folder / "reference.log"]
    processes = [
        launch(["avatar_rl.cluster.cli", "train", str(file)], logs[0]),
        launch(["tests.reference_loop", str(file), str(folder / "reference")], logs[1]),
    ]
    finish(processes, logs)
    [run] = (folder / "runs").iterdir()
    return folder / "model", run, folder / "reference"


def steps_of(reference: Path) -> list[dict[str, Any]]:
    return json.loads((reference / "steps.json").read_text())


def test_public_sets_are_measured_before_during_and_after(
    outcome: tuple[Path, Path, Path],
) -> None:
    rows = {row["step"]: row for row in read_metrics(outcome[1])}
    measured = [step for step, row in rows.items() if "benchmark/accuracy/dailyomni" in row]
    assert measured == [0, 4, STEPS]
    for step in measured:
        row, file = rows[step], outcome[1] / "benchmarks" / f"step_{step:06d}.jsonl"
        answers = list(read_jsonl(file))
        assert len(answers) == 3 and all(answer["set"] == "dailyomni" for answer in answers)
        accuracy = sum(answer["score"] for answer in answers) / 3
        assert row["benchmark/accuracy/dailyomni"] == pytest.approx(accuracy)
        assert row["benchmark/low/dailyomni"] <= accuracy <= row["benchmark/high/dailyomni"]


def test_the_run_exercises_what_it_should(outcome: tuple[Path, Path, Path]) -> None:
    """Else the comparison below would prove less than it seems to."""
    steps = steps_of(outcome[2])
    assert [step["fresh"] for step in steps] == [16] + [8] * (
        STEPS - 1
    )  # whole groups until replay is warm
    assert [step["replayed"] for step in steps] == [0] + [8] * (STEPS - 1)
    assert [step["hinted"] for step in steps] == [0, 0, 0, 0, 8, 8]  # from the second visit on
    assert all(step["grad_norm"] > 0.5 for step in steps)  # clipped
    assert len({step["reward"] for step in steps}) > 2


def test_metrics_equal_the_reference_loop(outcome: tuple[Path, Path, Path]) -> None:
    _, run, reference = outcome
    rows = [row for row in read_metrics(run) if row["step"]]
    steps = steps_of(reference)
    assert len(rows) == len(steps) == STEPS
    for row, step in zip(rows, steps, strict=True):
        assert row["reward/mean"] == step["reward"]
        assert row["tokens/trained"] == step["tokens"]
        assert row["hints/visits"] == step["hinted"]
        assert row["staleness/max"] == 0
        assert row["loss/total"] == pytest.approx(step["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
    assert [row["lr"] for row in rows] == pytest.approx(
        [5e-4 * share for share in (1 / 3, 2 / 3, 1, 1, 1, 1)]
    )


def test_the_run_took_embeddings_and_recomputed_activations(
    outcome: tuple[Path, Path, Path],
) -> None:
    """Packs, checkpointing and the embedding store were all on: what is compared below is theirs.

    Only an encoder that takes embeddings reports hits; with ``mode: on`` there is no other."""
    _, run, _ = outcome
    config = load_recipe(run.parents[1] / "recipe.yaml").learner
    assert config.gradient_checkpointing and config.embeddings.mode == "on"
    rows = [row for row in read_metrics(run) if row["step"]]
    assert [entry for entry in (run.parents[1] / "store").glob("*.embedding")]
    assert all("media/store_hit_share" in row for row in rows)
    # Replays ask for prompts that were encoded when they were fresh.
    assert all(row["media/store_hit_share"] > 0 for row in rows[1:])


def test_parameters_equal_the_reference_loop(outcome: tuple[Path, Path, Path]) -> None:
    """Every number of every tensor agrees to 1e-5, and what training changed of them to 1e-4 of the
    change. Towers stay as they were.

    Not bit for bit: vLLM batches requests as they come, which rounds log-probabilities differently
    (1e-7)."""
    model, run, reference = outcome
    start = load_file(model / "model.safetensors")
    trained = load_file(run / "checkpoint" / "model.safetensors")
    expected = load_file(reference / "model.safetensors")
    assert trained.keys() == expected.keys() == start.keys()

    def norm(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor] | None = None) -> float:
        parts = [left[name].double() - (right[name].double() if right else 0) for name in left]
        return float(torch.stack([part.norm() for part in parts]).norm())

    assert norm(expected, start) > 1e-3 * norm(start)
    assert norm(trained, expected) < 1e-4 * norm(expected, start)
    apart = {name: float((trained[name] - expected[name]).abs().max()) for name in expected}
    frozen = [name for name in start if {"visual", "audio_tower"} & set(name.split("."))]
    assert frozen and all(torch.equal(trained[name], start[name]) for name in frozen)
    assert max(apart.values()) < 1e-5, max(apart, key=lambda name: apart[name])


def test_nothing_is_left_behind(outcome: tuple[Path, Path, Path]) -> None:
    _, run, _ = outcome
    status = read_status(run)
    assert status.state == "finished" and status.step == STEPS
    books = [row for row in read_metrics(run) if row["step"]][-1]
    assert books["ledger/generated"] == books["ledger/trained_fresh"] == STEPS * 4
    mine = [
        Path(f"/proc/{entry.name}/cmdline")
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
    ]
    orphans = []
    for file in mine:
        try:
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if str(run.parent) in command:
            orphans.append(command)
    assert orphans == []
