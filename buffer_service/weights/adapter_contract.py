"""What a published adapter must be before it touches a running engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from avatar_rl.buffer_service.weights.receiver import ProvenWeights
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.common.errors import ModelError
from avatar_rl.common.weight_files import WeightFiles

A, B = ".lora_A.weight", ".lora_B.weight"


class AdapterContract:
    """Names and shapes that an adapter of ``shape`` has on the checkpoint in ``model_path``.

    Raises ModelError as ``WeightFiles.find`` does.
    """

    def __init__(self, model_path: Path, shape: AdapterShape) -> None:
        self.headers, self.rank = WeightFiles.find(model_path).headers(), shape.rank
        self._layers: set[str] | None = None  # of the first version

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> ProvenWeights:
        """The adapter as a list, proven whole: pairs ``<published layer>.lora_A.weight`` (rank,
        inputs) and ``lora_B`` (outputs, rank), on the same layers in every version.

        Raises ModelError for what is missing, unknown, misshapen or not finite."""
        if isinstance(weights, ProvenWeights):
            return weights
        given = dict(weights)
        layers = {name.removesuffix(A).removesuffix(B) for name in given}
        for layer in sorted(layers):
            header = self.headers.get(f"{layer}.weight")
            if header is None or len(header.shape) != 2:
                raise ModelError(
                    f"adapter refused: {layer!r} is no linear layer of the checkpoint; was another "
                    "model published?"
                )
            base = header.shape
            sides = {layer + A: (self.rank, base[1]), layer + B: (base[0], self.rank)}
            for name, shape in sides.items():
                tensor = given.get(name)
                if tensor is None or tuple(tensor.shape) != shape:
                    found = None if tensor is None else tuple(tensor.shape)
                    raise ModelError(f"adapter refused: {name!r} is {found}, {shape} is due")
                if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                    raise ModelError(
                        f"adapter refused: {name!r} holds NaN or infinity, or no numbers; look at "
                        "the learner's loss"
                    )
        if not layers or layers != (self._layers or layers):
            raise ModelError(
                f"adapter refused: it has {len(layers)} layers, the version before had "
                f"{len(self._layers or ())}"
            )
        self._layers = layers
        return ProvenWeights(given.items())
