"""Weights as bytes: what the learner hands to the weight store, and the proof with which rollout
actors take it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pickle import PickleBuffer

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_intdigest as _checksum

from avatar_rl.buffer_service.weights.store import Manifest, WeightMessage
from avatar_rl.common.errors import ModelError

ALIGN = 64  # bytes: a tensor of any type may begin there

DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}
_NAMES = {kind: name for name, kind in DTYPES.items()}


class WeightBlock:
    """Host memory for one version of some weights, laid out once and filled again and again."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        """Room for tensors like ``weights``, which may be on the meta device; those of a floating
        type as ``dtype`` if one is given. ``memory`` of just the right size may be given, too."""
        self._manifest = manifest_of(weights, dtype)
        offsets, size = layout_of(self._manifest)
        self._data = np.zeros(size, dtype=np.uint8) if memory is None else memory
        self._places = views_of(self._manifest, offsets, self._data)

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Copies and casts ``weights``, some or all, from any device, over what was here. Their
        shapes are those of the block."""
        torch._foreach_copy_([self._places[name] for name in weights], list(weights.values()))

    def message(self, version: int) -> WeightMessage:
        """What is here as ``version``, ready to travel. Nothing is copied: fill the block again
        only when nobody reads the message any more."""
        block = self._data.data
        return WeightMessage(version, self._manifest, _checksum(block), PickleBuffer(block))

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    @staticmethod
    def size_of(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
        """Bytes of a block for such tensors."""
        return layout_of(manifest_of(weights, dtype))[1]


def pack_weights(version: int, weights: Mapping[str, Tensor]) -> WeightMessage:
    """A copy of ``weights`` as ``version``."""
    block = WeightBlock(weights)
    block.fill(weights)
    return block.message(version)


def unpack_weights(message: WeightMessage) -> dict[str, Tensor]:
    """The tensors of a message, verified; views of its memory. Raises ModelError for truncated or
    altered bytes."""
    block = np.frombuffer(memoryview(message.block), np.uint8)
    offsets, size = layout_of(message.manifest)
    if size != len(block):
        raise ModelError(
            f"published weights are partial: {len(block)} bytes, {size} by their manifest"
        )
    if _checksum(block.data) != message.checksum:
        raise ModelError("published weights are corrupt (checksum differs): the version is refused")
    with warnings.catch_warnings():
        # The object store's pages are read-only, of which torch warns; nobody writes to them.
        warnings.simplefilter("ignore", UserWarning)
        return views_of(message.manifest, offsets, block)


def manifest_of(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Manifest:
    """Shapes and types of tensors, those of a floating type as ``dtype`` if one is given."""
    return {
        name: (
            tuple(tensor.shape),
            _NAMES[dtype if dtype and tensor.is_floating_point() else tensor.dtype],
        )
        for name, tensor in weights.items()
    }


def checksum_of(flat: Tensor) -> int:
    """XXH3 of bytes on the host, 64 bits."""
    return _checksum(flat.numpy().data)


def layout_of(manifest: Manifest) -> tuple[list[int], int]:
    """Where each tensor begins in a block, and how long the block is, in bytes."""
    offsets, at = [], 0
    for shape, kind in manifest.values():
        offsets.append(at)
        at += -(-math.prod(shape) * DTYPES[kind].itemsize // ALIGN) * ALIGN
    return offsets, at


def views_of(
    manifest: Manifest, offsets: Sequence[int], block: NDArray[np.uint8]
) -> dict[str, Tensor]:
    """The tensors that lie in ``block``, without a copy."""
    views: dict[str, Tensor] = {}
    for (name, (shape, kind)), offset in zip(manifest.items(), offsets, strict=True):
        dtype, count = DTYPES[kind], math.prod(shape)
        if count:
            views[name] = torch.frombuffer(block, dtype=dtype, count=count, offset=offset).view(
                shape
            )
        else:  # torch makes no view of nothing
            views[name] = torch.empty(shape, dtype=dtype)
    return views
