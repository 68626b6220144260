"""Weights out: a trained version becomes visible to rollout actors through the weight board."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from buffer_service.weights import Arrays, Manifest, pack_weights
from learner.model import DTYPES, checkpoint_names, published_names
from prompts.errors import ModelError


class Publisher:
    """Names, casts, checksums and stores one full set of weights per version. Runs on rank 0."""

    def __init__(self, base: Path, names: list[str], board: Any, *, dtype: str) -> None:
        self.mapping = published_names(names, checkpoint_names(base))
        self.board = board
        self.dtype = DTYPES[dtype]
        self.last: tuple[int, Any, Any] | None = None  # version, manifest, arrays: the board may lose them
        self.outgoing: Arrays = {}  # of the version being published, for the board to take
        self.turn = threading.Lock()

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under their published names, in the serving dtype."""
        return {
            self.mapping[name]: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
            if name in self.mapping
        }

    def publish(self, version: int, weights: dict[str, Tensor]) -> int:
        """Put version ``version`` on the board and return its bytes. The board owns what it takes: it outlives us.

        Call it inside the actor whose ``publisher`` this is; the board fetches ``outgoing`` from it meanwhile, so the
        actor needs one thread (max_concurrency) more than calls that may publish at once.
        """
        with self.turn:
            manifest, arrays = pack_weights(self.rename(weights))
            self.last = (version, manifest, arrays)
            return self._put_out(version, manifest, arrays)

    def publish_again(self, version: int | None, weights: dict[str, Tensor] | None) -> int:
        """Publish ``weights`` as ``version``, or the last published ones; the version, 0 where there is none."""
        if version is not None and weights is not None:
            self.publish(version, weights)
        elif self.last is not None:
            with self.turn:
                version, manifest, arrays = self.last
                self._put_out(version, manifest, arrays)
        return version or 0

    def _put_out(self, version: int, manifest: Manifest, arrays: Arrays) -> int:
        import ray

        self.outgoing = arrays
        try:
            ray.get(self.board.take.remote(version, manifest, [ray.get_runtime_context().current_actor]))
            return sum(array.nbytes for array in arrays.values())
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ModelError) else error from error
        finally:
            self.outgoing = {}
