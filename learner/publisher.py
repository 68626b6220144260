"""Weights out: a trained version becomes visible to rollout actors through the weight board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from buffer_service.weights import pack_weights
from learner.model import DTYPES, checkpoint_names, published_names


class Publisher:
    """Names, casts, checksums and stores one full set of weights per version. Runs on rank 0."""

    def __init__(self, base: Path, names: list[str], board: Any, *, dtype: str) -> None:
        self.mapping = published_names(names, checkpoint_names(base))
        self.board = board
        self.dtype = DTYPES[dtype]
        self.last: tuple[int, Any, Any] | None = None  # version, manifest, arrays: the board may lose them

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under their published names, in the serving dtype."""
        return {
            self.mapping[name]: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
            if name in self.mapping
        }

    def publish(self, version: int, weights: dict[str, Tensor]) -> int:
        """Put version ``version`` on the board and return its bytes. The board keeps its own copy: it outlives us."""
        import ray

        manifest, arrays = pack_weights(self.rename(weights))
        self.last = (version, manifest, arrays)
        ray.get(self.board.publish.remote(version, manifest, ray.put(arrays)))
        return sum(array.nbytes for array in arrays.values())

    def publish_again(self, version: int | None, weights: dict[str, Tensor] | None) -> int:
        """Publish ``weights`` as ``version``, or the last published ones; the version, 0 where there is none."""
        import ray

        if version is not None and weights is not None:
            self.publish(version, weights)
        elif self.last is not None:
            version, manifest, arrays = self.last
            ray.get(self.board.publish.remote(version, manifest, ray.put(arrays)))
        return version or 0
