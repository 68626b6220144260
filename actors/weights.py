"""What a weight update must look like before it may touch a running engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from prompts.errors import ModelError

#: Parts of a published omni checkpoint that speak; they never generate text and are never updated.
UNUSED = ("talker.", "token2wav.", "code2wav.")


class WeightContract:
    """Names and shapes of the checkpoint an engine was started from.

    Raises ModelError when the folder holds no safetensors.
    """

    def __init__(self, model_path: Path) -> None:
        files = sorted(model_path.glob("*.safetensors"))
        if not files:
            raise ModelError(f"model folder {model_path} has no *.safetensors file: convert it with save_pretrained")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.floats: dict[str, bool] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    header = tensors.get_slice(name)
                    self.shapes[name] = tuple(header.get_shape())
                    self.floats[name] = header.get_dtype().startswith(("F", "BF"))

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The update as a list, proven complete. Names are those of the published checkpoint.

        Raises ModelError for a missing, unknown, doubled, misshapen, wrongly typed or non-finite tensor.
        """
        given: dict[str, Tensor] = {}
        for name, tensor in weights:
            if name in given:
                raise ModelError(f"weight update refused: tensor {name!r} comes twice")
            given[name] = tensor
        missing = [name for name in self.shapes if name not in given and not name.startswith(UNUSED)]
        unknown = [name for name in given if name not in self.shapes]
        if missing or unknown:
            raise ModelError(
                f"weight update refused: {len(missing)} tensors missing (first {min(missing, default=None)!r}), "
                f"{len(unknown)} not in the base checkpoint (first {min(unknown, default=None)!r}); "
                "publish every tensor under its published name"
            )
        for name, tensor in given.items():
            if tuple(tensor.shape) != self.shapes[name]:
                raise ModelError(
                    f"weight update refused: {name!r} has shape {tuple(tensor.shape)}, the checkpoint "
                    f"{self.shapes[name]}; was another model published?"
                )
            if tensor.is_floating_point() != self.floats[name]:
                kind = "a float" if self.floats[name] else "an integer"
                raise ModelError(f"weight update refused: {name!r} is {tensor.dtype}, the checkpoint has {kind} type")
            if self.floats[name] and not _finite(tensor):
                raise ModelError(f"weight update refused: {name!r} holds NaN or infinity; look at the learner's loss")
        return list(given.items())


def _finite(tensor: Tensor) -> bool:
    # NaN and infinity survive a sum, which reads once and writes nothing; the exact test only settles an overflow.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
