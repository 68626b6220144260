"""The names that a model's tensors carry in published checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from avatar_rl.common.errors import ModelError

#: (prefix in our module, prefix in a published checkpoint), tried in order after the unchanged
#: name.
RENAMES = (
    # Qwen2.5-Omni and Qwen3-Omni: we train the thinker of a published omni checkpoint
    ("", "thinker."),
    ("model.language_model.", "model."),  # Qwen2.5-VL as published before transformers 4.52
    ("model.visual.", "visual."),
)


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
