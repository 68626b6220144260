"""Weights out: a trained version becomes visible to rollout actors through the weight board."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import Tensor

from avatar_rl.buffer_service.weights.block import WeightBlock
from avatar_rl.buffer_service.weights.outbox import Outbox
from avatar_rl.learner.model.load import DTYPES


class Publisher:
    """Names, casts, copies, checksums and hands over one full set of weights per version. Runs on
    rank 0.

    ``names`` maps our parameter names to published ones (``published_names``); others are left out.
    """

    def __init__(self, names: Mapping[str, str], outbox: Outbox | None, *, dtype: str) -> None:
        self.names = names
        self.outbox = outbox
        self.dtype = DTYPES[dtype]
        #: The one the board may still be reading, or be asked to read again, and the one to write
        #: to.
        self._blocks: list[WeightBlock] = []
        self._turn = threading.Lock()

    def rename(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under their published names, in the serving dtype."""
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self._published(weights).items()
        }

    def publish(self, version: int, weights: Mapping[str, Tensor]) -> int:
        """Put ``version`` out for the board and return its bytes. ``weights`` may be the parameters
        themselves: they are copied here, and may change as soon as this returns.

        Raises ModelError when the board does not take the version before.
        """
        assert self.outbox is not None
        with self._turn:
            self.outbox.await_taken()  # so nobody reads the version before the last
            block = self._other_block(published := self._published(weights))
            block.fill(published)
            self.outbox.put(block.parcel(version))
        return block.nbytes

    def put_again(self) -> int:
        """Let a board that lost it have the last published version; its number, 0 where there is
        none."""
        return self.outbox.put_again() if self.outbox is not None else 0

    def _published(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.names[name]: tensor for name, tensor in weights.items() if name in self.names}

    def _other_block(self, weights: Mapping[str, Tensor]) -> WeightBlock:
        """The block that was not filled last."""
        if len(self._blocks) < 2:
            self._blocks.append(WeightBlock(weights, self.dtype))
        else:
            self._blocks.reverse()
        return self._blocks[-1]
