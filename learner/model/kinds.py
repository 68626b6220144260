"""What a checkpoint folder holds, by its config: the model type, and transformers' class for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from avatar_rl.common.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(path: Path) -> str:
    """The model type of a folder. Raises ModelError where its config.json says of no model that can
    be trained."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"model folder {path} has no config.json: give a Hugging Face checkpoint folder"
        )
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ModelError(
            f"{config_file} is not readable JSON ({error}): copy the checkpoint again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} holds no JSON object: copy the checkpoint again")
    kind = config.get("model_type", "")
    if config.get("quantization_config"):
        raise ModelError(
            f"model folder {path} (model_type {kind!r}) is quantised, which cannot be trained: "
            "use the checkpoint it was made from"
        )
    return str(kind)


def class_name(kind: str) -> str:
    """transformers' class for checkpoints of model type ``kind``; the thinker's of an omni one."""
    thinkers = {
        "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
        "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    }
    vision_language = {"qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"}
    return thinkers.get(kind) or (
        "AutoModelForImageTextToText" if kind in vision_language else "AutoModelForCausalLM"
    )


def model_config(path: Path) -> PretrainedConfig:
    """The config of what is trained of a folder: of an omni checkpoint its thinker's."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(path)
    return getattr(config, "thinker_config", config)
