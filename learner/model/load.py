"""Loading a trainable model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avatar_rl.common.errors import AvatarError, ModelError
from avatar_rl.common.weight_files import WeightFiles, loadable_folder
from avatar_rl.learner.model.check import check_layers, check_scores
from avatar_rl.learner.model.names import NameMap, checkpoint_names
from avatar_rl.prompts.encoding.chat_format import describe

_QUANTISED = ("I8", "U8", "F8", "F4", "I4", "U4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path: Path, *, dtype: str = "float32") -> nn.Module:
    """The model of a Hugging Face folder with its language-model head, in evaluation mode; the
    thinker of an omni checkpoint.

    Raises ModelError when the folder has no config, is not one whole checkpoint, or holds an
    architecture that is not supported.
    """
    import transformers

    kind = read_config(path)
    name = class_name(kind)
    model_class = getattr(transformers, name)
    try:
        check_types(path)
        check_experts(model_class, path)
        model, loaded = model_class.from_pretrained(
            loadable_folder(path), dtype=DTYPES[dtype], output_loading_info=True
        )
    except AvatarError:
        raise
    except Exception as error:  # transformers fails in many ways on settings that nobody foresaw
        raise ModelError(
            f"model folder {path} (model_type {kind!r}) cannot be loaded as {name} "
            f"({describe(error)}): correct its "
            "config.json, or copy the folder again from the model's source"
        ) from error
    if missing := loaded["missing_keys"]:
        raise ModelError(
            f"model folder {path} (model_type {kind!r}) lacks {len(missing)} tensors, first "
            f"{min(missing)!r}: they would be random; copy the checkpoint again"
        )
    model.config.use_cache = False
    check_layers(model.config, kind)
    check_scores(model.eval(), kind)
    return model


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


def recompute_activations(model: nn.Module) -> None:
    """Keep only what each layer reads; its backward pass computes the rest again.

    transformers does so in training mode alone. Here only the layers themselves are set to it: what
    is inside them stays in evaluation mode, for dropout would break the ratio of policies."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    options = {"use_reentrant": False, "preserve_rng_state": False}
    model.gradient_checkpointing_enable(options)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


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


def check_types(path: Path) -> None:
    """Raises ModelError for weights in a quantised type that no config names: loaders would take
    the bare integers for values."""
    for name, header in WeightFiles.find(path).headers().items():
        if name.endswith(".weight") and header.dtype.startswith(_QUANTISED):
            raise ModelError(
                f"model folder {path} holds {name!r} as {header.dtype}, which is quantised and "
                "cannot be trained: use the checkpoint it was made from"
            )


def check_experts(model_class: Any, path: Path) -> None:
    """Raises ModelError for experts in an unknown layout, before gigabytes of them are read."""
    from transformers import AutoConfig

    if not any("expert" in name for name in checkpoint_names(path)):
        return
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):  # one of the Auto classes
            model = model_class.from_config(AutoConfig.from_pretrained(path))
        else:
            model = model_class._from_config(model_class.config_class.from_pretrained(path))
    NameMap.of(model, path)
