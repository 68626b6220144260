"""`avatar init` writes recipes that resolve, or says what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands.keys.init import Split, share_out
from avatar_rl.cluster.machine.fit import RESERVE
from avatar_rl.cluster.recipe.architecture import ARCHITECTURES
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.recipe.memory import GIB, LearnerSetting, MemoryPlan, lasting_bytes
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


@pytest.fixture
def omni(here: Path) -> Path:
    """Qwen2.5-Omni-3B as its config.json has it, without weights."""
    folder = here / "Qwen2.5-Omni-3B"
    folder.mkdir()
    text = {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11_008,
        "max_position_embeddings": 32_768,
    }
    thinker = {"text_config": text, "audio_config": {}, "vision_config": {}}
    config = {"model_type": "qwen2_5_omni", "thinker_config": thinker}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("gpus", "gib", "shared", "cache"),
    [(1, 80, True, 16), (1, 24, True, 8), (2, 24, True, 8), (8, 80, False, None)],
)
def test_a_recipe_for_gpus_is_one_that_the_plan_holds(
    omni: Path, here: Path, gpus: int, gib: int, shared: bool, cache: int | None
) -> None:
    words = ["init", "mine.yaml", "--model", omni.name, "--data", "train.jsonl"]
    assert main([*words, "--gpus", str(gpus), "--gpu-memory", str(gib)]) == 0
    config = load_recipe(here / "mine.yaml")
    assert config.resources.colocate is shared is (config.learner.lora is not None)
    assert config.rollout.engine.kv_cache_memory_bytes == (cache and cache * GIB)
    assert config.data.template.total_video_tokens == 10_240
    assert config.data.media.missing_sound == "silence" and config.data.reader.audio_in_video
    assert config.learner.optimizer.freeze == ("visual", "audio_tower")
    plan = MemoryPlan.of(config)
    assert plan is not None
    if shared:
        assert config.loop.max_staleness == 0 and not plan.misfits(gib * GIB)
        assert config.learner.ranks == config.rollout.workers == gpus
    else:
        assert config.learner.ranks + config.rollout.workers == gpus
        assert plan.learner_gpu + RESERVE <= gib * GIB


def test_gpus_that_are_too_small_are_said_in_the_recipe(omni: Path, here: Path) -> None:
    words = ["init", "mine.yaml", "--model", omni.name, "--data", "train.jsonl"]
    assert main([*words, "--gpus", "1", "--gpu-memory", "8"]) == 0
    assert "does not fit: generating takes" in (here / "mine.yaml").read_text()


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
    assert share_out(None, 0, 0.0) == Split(1, 1)
    assert share_out(small, 1, 80 * GIB) == Split(1, 1, shared=True)
    eight = share_out(small, 8, 80 * GIB)
    assert (eight.rollouts, eight.ranks, eight.offload, eight.note) == (4, 4, False, "")
    assert (
        lasting_bytes(small, LearnerSetting(ranks=4, zero_stage=3)) + 15 * GIB <= 80 * GIB
    )  # which is why
    many = share_out(small, 8, 40 * GIB)
    asked = LearnerSetting(ranks=many.ranks, zero_stage=3, offload=many.offload)
    assert lasting_bytes(small, asked) + 15 * GIB <= 40 * GIB
    assert many.rollouts + many.ranks == 8
    few = share_out(large, 2, 24 * GIB)
    assert few.shared and (few.rollouts, few.ranks) == (2, 2)
    assert "does not fit on 2 GPUs of 24 GiB" in few.note
