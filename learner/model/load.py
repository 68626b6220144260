"""Loading a trainable model and the names its tensors carry in published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from avatar_rl.common.errors import ModelError

#: (prefix in our module, prefix in a published checkpoint), tried in order after the unchanged
#: name.
RENAMES = (
    (
        "",
        "thinker.",
    ),  # Qwen2.5-Omni and Qwen3-Omni: we train the thinker of a published omni checkpoint
    ("model.language_model.", "model."),  # Qwen2.5-VL as published before transformers 4.52
    ("model.visual.", "visual."),
)

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


def checkpoint_names(path: Path) -> set[str]:
    """Tensor names of a safetensors checkpoint, sharded or not, read from the headers only."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"model folder {path} has no *.safetensors file: convert it with save_pretrained first"
        )
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def published_names(names: Iterable[str], checkpoint: set[str]) -> dict[str, str]:
    """Map our parameter names to those of the published checkpoint. Raises ModelError for a name
    with no match.

    An output head tied to the embeddings is absent from both sides of a published checkpoint and is
    left out."""
    mapping: dict[str, str] = {}
    for name in names:
        candidates = [name] + [
            new + name.removeprefix(old) for old, new in RENAMES if name.startswith(old)
        ]
        match = next((candidate for candidate in candidates if candidate in checkpoint), None)
        if match is None and name == "lm_head.weight":
            continue
        if match is None:
            raise ModelError(
                f"parameter {name!r} has no counterpart in the base checkpoint: wrong model folder?"
            )
        mapping[name] = match
    return mapping
