"""How a LoRA run's versions reach the rollouts: chosen, told and refused before anything starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import save_file

from avatar_rl.actors import vllm_models
from avatar_rl.buffer_service.weights.adapter_contract import AdapterContract
from avatar_rl.buffer_service.weights.receiver import WeightContract
from avatar_rl.cluster.adapter_road import adapter_road, road_words
from avatar_rl.cluster.cli import main
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.memory import MemoryPlan
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.common.errors import ModelError

NEEDS_VLLM = pytest.mark.skipif(
    not vllm_models.architectures(), reason="vLLM is not installed here"
)


def recipe(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"data": {"synthetic": {}}} | sections)


def checkpoint(folder: Path, architecture: str) -> Path:
    """A language model with an expert and a router, and a tower."""
    folder.mkdir(parents=True)
    names = (
        *("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"),
        *("model.layers.0.mlp.gate", "model.layers.0.mlp.experts.0.up_proj"),
        *("model.visual.blocks.0.attn.qkv", "lm_head"),
    )
    tensors = {f"{name}.weight": np.ones((8, 8), np.float32) for name in names}
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "qwen3", "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_engine_makes_room_in_the_adapted_layers_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "Qwen3ForCausalLM")
    shape, why = adapter_road(recipe(learner={"lora": {"rank": 4, "alpha": 8}}), folder)
    assert not why and shape == AdapterShape(4, 8.0, False, ("o_proj", "q_proj"))


@pytest.mark.parametrize(
    ("lora", "road", "said"),
    [
        ({"rank": 4}, "merged", "rollout.lora is merged"),
        ({"rank": 513}, "adapter", "vLLM takes ranks up to 512"),
        (
            {"rank": 4, "targets": ["llm", "vision"]},
            "adapter",
            "1 layers of towers .*blocks.0.attn",
        ),
    ],
)
def test_what_is_merged_is_said_with_its_reason(
    tmp_path: Path, lora: dict[str, object], road: str, said: str
) -> None:
    folder = checkpoint(tmp_path / "model", "Qwen3ForCausalLM")
    words = road_words(recipe(learner={"lora": lora}, rollout={"lora": road}), folder)
    assert words.startswith("merged weights: ")
    assert re.search(said, words), words


@NEEDS_VLLM
def test_a_model_that_vllm_does_not_adapt_is_merged(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "GPT2LMHeadModel")
    shape, why = adapter_road(recipe(learner={"lora": {"rank": 4}}), folder)
    assert shape is None and "takes no adapters for GPT2LMHeadModel" in why


@pytest.mark.parametrize(
    ("lora", "architecture", "whole"),
    [
        ({"rank": 4}, "Qwen3ForCausalLM", False),
        ({"rank": 513}, "Qwen3ForCausalLM", True),
        ({"rank": 4, "targets": ["qkv"]}, "Qwen3ForCausalLM", True),  # a tower's, by no word
        pytest.param({"rank": 4}, "GPT2LMHeadModel", True, marks=NEEDS_VLLM),
    ],
)
def test_the_memory_plan_counts_a_version_as_it_is_published(
    tmp_path: Path, lora: dict[str, object], architecture: str, whole: bool
) -> None:
    folder = checkpoint(tmp_path / "Qwen2.5-Omni-7B", architecture)  # its size by its name
    config = recipe(learner={"lora": lora}, model={"path": str(folder)})
    plan = MemoryPlan.of(config)
    assert plan is not None and (adapter_road(config, folder)[0] is None) is whole
    assert (plan.version == plan.weights) is whole
    assert whole or plan.version < plan.weights / 100


def test_without_the_checkpoint_the_recipe_says_what_is_published(tmp_path: Path) -> None:
    def version(lora: dict[str, object]) -> float:
        path = str(tmp_path / "Qwen2.5-Omni-7B")
        plan = MemoryPlan.of(recipe(learner={"lora": lora}, model={"path": path}))
        assert plan is not None
        return plan.version / plan.weights

    assert version({"rank": 4}) < 0.01
    assert version({"rank": 513}) == version({"targets": ["llm", "vision"]}) == 1.0


@NEEDS_VLLM
@pytest.mark.parametrize(
    ("architecture", "adapted"),
    [
        ("Qwen3OmniMoeForConditionalGeneration", True),
        ("Qwen2_5OmniModel", True),
        ("Qwen3MoeForCausalLM", True),
        ("Gemma3ForCausalLM", True),
        ("MistralForCausalLM", True),  # through what it inherits, in another module
        ("FalconForCausalLM", False),
        ("Gemma3nForCausalLM", False),
        ("SomethingNewForCausalLM", True),  # the engine's start has the last word
    ],
)
def test_vllms_source_tells_which_models_it_adapts(architecture: str, adapted: bool) -> None:
    assert vllm_models.takes_adapters(architecture) is adapted


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("{rank: 4}", "the adapter"),
        ("{rank: 4, targets: [vision]}", "merged weights: learner.lora adapts 1 layers"),
    ],
)
def test_the_dry_run_tells_the_road(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: str, said: str
) -> None:
    file = tmp_path / "recipe.yaml"
    folder = checkpoint(tmp_path / "model", "Qwen3ForCausalLM")
    text = f"data: {{synthetic: {{}}}}\nmodel: {{path: {folder}}}\nlearner: {{lora: {lora}}}\n"
    for path, words in ((folder, said), (tmp_path / "absent", said.split(":")[0])):
        file.write_text(text.replace(str(folder), str(path)))
        assert main(["train", str(file), "--dry-run"]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if "rollouts take" in line]
        assert words in line


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollout": {"lora": "merged"}}, r"rollout\.lora merged .*nothing reads it"),
        (
            {"rollout": {"engine": {"vllm": {"fully_sharded_loras": True}}}},
            r"vllm\.fully_sharded_loras is for adapters.*learner\.lora is not set",
        ),
        (
            {
                "rollout": {"lora": "merged", "engine": {"vllm": {"fully_sharded_loras": True}}},
                "learner": {"lora": {}},
            },
            r"vllm\.fully_sharded_loras is for adapters.*rollout\.lora is merged",
        ),
    ],
)
def test_adapter_and_merged_mixed_is_refused(sections: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(**sections)


def test_an_engine_takes_no_version_of_the_other_kind(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "Qwen3ForCausalLM")
    layer = "model.layers.0.self_attn.q_proj"
    adapter = {
        f"{layer}.lora_A.weight": torch.ones(4, 8),
        f"{layer}.lora_B.weight": torch.ones(8, 4),
    }
    contract = AdapterContract(folder, AdapterShape(4, 8.0, False, ("q_proj",)))
    contract.check(adapter.items())
    with pytest.raises(ModelError, match="is no linear layer of the checkpoint"):
        contract.check({f"{layer}.weight": torch.ones(8, 8)}.items())
    with pytest.raises(ModelError):
        WeightContract(folder).check(adapter.items())
