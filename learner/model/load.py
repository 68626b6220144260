"""Loading a trainable model."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avatar_rl.common.errors import AvatarError, ModelError
from avatar_rl.common.weight_files import WeightFiles, loadable_folder
from avatar_rl.learner.model.check import check_layers, check_scores
from avatar_rl.learner.model.kinds import DTYPES, class_name, model_config, read_config
from avatar_rl.learner.model.names import NameMap, checkpoint_names
from avatar_rl.learner.model.stand_in import SmallError, try_small
from avatar_rl.prompts.encoding.chat_format import describe

_QUANTISED = ("I8", "U8", "F8", "F4", "I4", "U4")


def load_model(
    path: Path, *, dtype: str = "float32", device: torch.device | None = None
) -> nn.Module:
    """The model of a Hugging Face folder with its language-model head, in evaluation mode; the
    thinker of an omni checkpoint.

    With ``device`` each tensor goes there as soon as it is read: a GPU's model is never held by the
    host. In its place a small one of the same kind is tried.

    Raises ModelError when the folder has no config, is not one whole checkpoint, or holds an
    architecture that is not supported.
    """
    import transformers

    kind = read_config(path)
    name = class_name(kind)
    model_class = getattr(transformers, name)
    tried = False
    try:
        check_types(path)
        if device is not None:
            with suppress(SmallError):  # then it is tried itself
                try_small(kind, model_config(path), dtype)
                tried = True
        check_experts(model_class, path)
        model, loaded = model_class.from_pretrained(
            loadable_folder(path),
            dtype=DTYPES[dtype],
            output_loading_info=True,
            device_map=None if device is None else {"": device},
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
    if not tried:
        check_scores(model.eval(), kind)
    return model.eval()


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
