"""The names that a model's tensors carry in published checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from avatar_rl.buffer_service.weights.receiver import is_trained
from avatar_rl.common.errors import ModelError
from avatar_rl.common.weight_files import WeightFiles

#: (prefix in our module, prefix in a published checkpoint), tried in order after the unchanged
#: name.
RENAMES = (
    # Qwen2.5-Omni and Qwen3-Omni: we train the thinker of a published omni checkpoint
    ("", "thinker."),
    ("model.language_model.", "model."),  # Qwen2.5-VL as published before transformers 4.52
    ("model.visual.", "visual."),
)


def checkpoint_names(path: Path) -> set[str]:
    """Tensor names of a safetensors checkpoint, sharded or not, read from the headers only.

    Raises ModelError as ``WeightFiles.find`` does."""
    return set(WeightFiles.find(path).tensors)


def published_names(names: Iterable[str], checkpoint: set[str]) -> dict[str, str]:
    """Map our parameter names to those of the published checkpoint.

    A head that is tied to the embeddings is left out where the checkpoint does not repeat it.
    Raises ModelError for a parameter or a tensor of the checkpoint without a counterpart."""
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
                f"parameter {name!r} has no counterpart in the base checkpoint: the folder is of "
                "another model, or its tensors are packed in another way (mixtures of experts "
                "often are); use a checkpoint of a supported model"
            )
        mapping[name] = match
    left = {name for name in checkpoint - set(mapping.values()) if is_trained(name)}
    if left:
        raise ModelError(
            f"{len(left)} tensors of the base checkpoint (first {min(left)!r}) are no parameters "
            "of the loaded model: rollout and learner would differ; use a checkpoint of a "
            "supported model"
        )
    return mapping
