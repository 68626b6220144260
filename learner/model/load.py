"""Loading a trainable model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from avatar_rl.common.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path: Path, *, dtype: str = "float32") -> nn.Module:
    """The model of a Hugging Face folder with its language-model head; the thinker of an omni
    checkpoint.

    Raises ModelError when the folder has no config or holds an architecture that is not supported.
    """
    import transformers

    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"model folder {path} has no config.json: give a Hugging Face checkpoint folder"
        )
    kind = json.loads(config_file.read_text()).get("model_type", "")
    classes = {
        "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
        "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    }
    vision_language = {"qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"}
    name = classes.get(kind) or (
        "AutoModelForImageTextToText" if kind in vision_language else "AutoModelForCausalLM"
    )
    try:
        model = getattr(transformers, name).from_pretrained(path, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model folder {path} (model_type {kind!r}) cannot be loaded as {name}: {error}"
        ) from error
    model.config.use_cache = False
    return model
