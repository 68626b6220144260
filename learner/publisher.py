"""Weights out: a trained version becomes visible to rollout actors through the weight board."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from buffer_service.weights import pack_weights, to_parcel
from learner.model import DTYPES, checkpoint_names, published_names
from learner.outbox import Outbox


class Publisher:
    """Names, casts, checksums and hands over one full set of weights per version. Runs on rank 0."""

    def __init__(self, base: Path, names: list[str], outbox: Outbox | None, *, dtype: str) -> None:
        self.mapping = published_names(names, checkpoint_names(base))
        self.outbox = outbox
        self.dtype = DTYPES[dtype]

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under their published names, in the serving dtype."""
        return {
            self.mapping[name]: tensor
            if tensor.dtype is self.dtype or not tensor.is_floating_point()
            else tensor.to(self.dtype)
            for name, tensor in weights.items()
            if name in self.mapping
        }

    def publish(self, version: int, weights: dict[str, Tensor]) -> int:
        """Put ``version`` out for the board and return its bytes. The board takes it meanwhile, and then owns it."""
        assert self.outbox is not None
        manifest, arrays = pack_weights(self.rename(weights))
        self.outbox.put(to_parcel(version, manifest, arrays))
        return sum(array.nbytes for array in arrays.values())

    def publish_again(self, version: int | None, weights: dict[str, Tensor] | None) -> int:
        """Publish ``weights`` as ``version``, or the last published ones; the version, 0 where there is none."""
        if version is not None and weights is not None:
            self.publish(version, weights)
            return version
        return self.outbox.put_again() if self.outbox is not None else 0
