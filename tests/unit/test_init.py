"""`avatar init` writes recipes that resolve, or says what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands.keys.init import Split, share_out
from avatar_rl.cluster.recipe.architecture import ARCHITECTURES
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.recipe.memory import GIB, LearnerSetting, lasting_bytes
from avatar_rl.cluster.recipe.ready_start import ready_start


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(
        '{"id": "1", "question": "How many?", "answer": "2", "problem_type": "numerical"}\n'
    )
    model = tmp_path / "Mini VL"
    model.mkdir()
    text = {"max_position_embeddings": 4096, "hidden_size": 8, "num_attention_heads": 2}
    (model / "config.json").write_text(
        json.dumps({"text_config": text, "vision_config": {"max_position_embeddings": 99}})
    )
    import numpy as np

    save_file({"visual.patch": np.zeros(3), "model.head": np.zeros(3)}, model / "m.safetensors")
    (model / "tokenizer.json").write_text("{}")
    (model / "preprocessor_config.json").write_text("{}")
    return tmp_path


def test_a_recipe_for_a_model_and_data_resolves(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init", "mine.yaml", "--model", "Mini VL", "--data", "train.jsonl", "--gpus", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "wrote mine.yaml" in said and "avatar train mine.yaml" in said
    config = load_recipe(here / "mine.yaml")
    assert config.name == "mini-vl" and config.preset == "avatar"
    assert config.data.train == here / "train.jsonl" and config.data.heldout is None
    assert config.rollout.engine.max_model_len == 4096
    assert config.data.template.max_prompt_tokens + config.rollout.sampling.max_tokens == 4096
    assert config.learner.optimizer.freeze == ("visual",)
    first = (here / "mine.yaml").read_text().splitlines()[0]
    assert Path(first.removeprefix("# yaml-language-server: $schema=")).is_file()


def test_what_is_missing_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["init", "mine.yaml", "--model", "Mini VL", "--data", "train.jsonl"]
    (here / "train.jsonl").write_text('{"question": "What?", "answer": "2"}\n')
    assert main([*words, "--gpus", "8", "--gpu-memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "missing  GPU: " in said and "then run it" in said
    assert "missing  data.train: " in said and "data.reader.problem_type" in said
    assert load_recipe(here / "mine.yaml").resources.learner_gpus == 1.0


def test_the_tiny_model_gets_the_demo(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "toy.yaml", "--model", "tiny"]) == 0
    config = load_recipe(here / "toy.yaml")
    assert config.model.path == "tiny" and ready_start(config) is not None
    assert "missing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("x.yaml",), "give --model"),
        (("x.yaml", "--model", "Mini VL"), "give --data"),
        (("x.yaml", "--model", "gone", "--data", "train.jsonl"), "hf download"),
        (("x.yaml", "--model", "Mini VL", "--data", "gone.jsonl"), "gone.jsonl does not exist"),
        (("x.yaml", "--model", "tiny", "--preset", "gropo"), "unknown preset 'gropo'"),
        (("x.txt", "--model", "tiny"), "a recipe's name ends in .yaml"),
        (("old.yaml", "--model", "tiny"), "is there already"),
    ],
)
def test_bad_input_is_an_error_and_writes_nothing(
    words: tuple[str, ...],
    said: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (here / "old.yaml").write_text("mine\n")
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    assert main(["init", *words]) == 1
    assert said in capsys.readouterr().err
    assert not (here / "x.yaml").exists() and (here / "old.yaml").read_text() == "mine\n"


def test_gpus_are_shared_out_by_the_memory_plan() -> None:
    small, large = ARCHITECTURES[0], ARCHITECTURES[-1]
    assert share_out(None, 0, 0.0) == Split(1, 1, 0.0, 0.0)
    one = share_out(small, 1, 80 * GIB)
    assert (one.rollouts, one.ranks, one.learner_gpus) == (1, 1, 0.45)
    eight = share_out(small, 8, 80 * GIB)
    assert (eight.rollouts, eight.ranks, eight.offload, eight.note) == (4, 4, False, "")
    assert (
        lasting_bytes(small, LearnerSetting(ranks=4, zero_stage=3)) + 15 * GIB <= 80 * GIB
    )  # which is why
    many = share_out(small, 8, 40 * GIB)
    asked = LearnerSetting(ranks=many.ranks, zero_stage=3, offload=many.offload)
    assert lasting_bytes(small, asked) + 15 * GIB <= 40 * GIB
    assert many.rollouts + many.ranks == 8
    assert "does not fit on 2 GPU(s) of 24 GiB" in share_out(large, 2, 24 * GIB).note
