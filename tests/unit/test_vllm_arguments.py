"""Arguments of vLLM in a recipe: passed on, or refused by name before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

import avatar_rl.actors.vllm_arguments as arguments
from avatar_rl.actors.config import EngineConfig
from avatar_rl.actors.engine.launch import check_heads, engine_arguments, pick_device
from avatar_rl.common.errors import ModelError, ResourceError


def test_what_is_not_ours_reaches_the_engine(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = EngineConfig(vllm={"enable_expert_parallel": True})
    found = engine_arguments(tmp_path, "qwen3", config, "cpu")
    assert found["enable_expert_parallel"] is True and found["model"] == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", r"vllm\.model is not yours to set: model\.path"),
        ("logprobs_mode", r"vllm\.logprobs_mode is not yours to set"),
        ("tensor_parallel_size", r"use rollout\.engine\.tensor_parallel_size"),
        ("max_lora_rank", r"vllm\.max_lora_rank is not yours to set: use learner\.lora\.rank"),
        ("enable_moe_shared_loras", r"routed experts get no adapter"),
        ("enable_expert_paralel", r"no argument of the installed vLLM.*enable_expert_parallel\?"),
    ],
)
def test_others_are_refused_by_name(name: str, message: str) -> None:
    if not arguments.argument_names() and "installed" in message:
        pytest.skip("vLLM is not installed")
    with pytest.raises(ValidationError, match=message):
        EngineConfig(vllm={name: True})


def test_whatever_the_engine_is_started_with_is_ours(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    for device in ("cpu", "cuda"):
        config = EngineConfig(max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 20)
        config = config.model_copy(update={"quantization": "fp8"} if device == "cuda" else {})
        started = engine_arguments(tmp_path, "qwen2_5_omni", config, device)
        left = started.keys() - arguments.OURS.keys()
        assert left <= {"enable_chunked_prefill", "skip_mm_profiling"}
    if known := arguments.argument_names():
        assert arguments.OURS.keys() <= known


def test_what_a_recipe_leaves_open_suits_the_device(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")

    def started(device: str, **settings: object) -> tuple[object, object]:
        config = EngineConfig.model_validate(settings)
        found = engine_arguments(tmp_path, "qwen3", config, device)
        return found["max_num_seqs"], found["max_num_batched_tokens"]

    assert started("cuda") == (256, 8192)
    assert started("cuda", max_num_batched_tokens=16_384, max_num_seqs=9) == (9, 16_384)
    assert started("cpu", max_model_len=512) == (64, 512)
    fp8 = EngineConfig(quantization="fp8")
    assert engine_arguments(tmp_path, "qwen3", fp8, "cuda")["quantization"] == "fp8"
    with pytest.raises(ResourceError, match="quantization fp8 needs a GPU: set it to null"):
        pick_device(fp8.model_copy(update={"device": "cpu"}))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_attention_heads": 6},
        {"num_attention_heads": 6, "num_key_value_heads": 1},
        {"text_config": {"num_attention_heads": 6}, "num_attention_heads": 5},
        {"thinker_config": {"text_config": {"num_attention_heads": 6}}},
    ],
)
def test_heads_must_divide(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check_heads(tmp_path, 3)
    with pytest.raises(ModelError, match=r"6 attention heads .* 4: set it to one of 1, 2, 3, 6$"):
        check_heads(tmp_path, 4)


def test_heads_of_keys_and_values_divide_or_are_copied(tmp_path: Path) -> None:
    settings = {"num_attention_heads": 12, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for shares in (1, 2, 4, 6, 12):
        check_heads(tmp_path, shares)
    with pytest.raises(ModelError, match=r"2 of keys and values.* 3: .*1, 2, 4, 6, 12"):
        check_heads(tmp_path, 3)
