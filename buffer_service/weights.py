"""Weights as bytes: what the learner hands to the weight board, and the proof with which rollout actors take it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pickle import PickleBuffer
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_intdigest as _checksum

from prompts.errors import ModelError

#: Shape of every tensor and its type as torch names it without the prefix ("bfloat16").
Manifest = dict[str, tuple[tuple[int, ...], str]]
#: A version as it travels: (version, manifest, checksum, block). The block holds the bytes of all tensors in the
#: manifest's order, each from a multiple of ``ALIGN`` on; the checksum is XXH3 of it, 64 bits: against damage, not
#: against malice, and as fast as memory. One bare buffer, which Ray copies once: hundreds of objects took longer than
#: 10 MB of weights.
Parcel = tuple[int, Manifest, int, Any]

ALIGN = 64

_TYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_NAMES = {kind: name for name, kind in _TYPES.items()}


class WeightBlock:
    """Host memory for one version of some weights, laid out once and filled again and again."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """Room for tensors like ``weights``, those of a floating type as ``dtype`` if one is given."""
        kinds = {n: dtype if dtype and t.is_floating_point() else t.dtype for n, t in weights.items()}
        sizes = [tensor.numel() * kinds[name].itemsize for name, tensor in weights.items()]
        self._data: NDArray[np.uint8] = np.zeros(sum(map(_aligned, sizes)), dtype=np.uint8)
        self._manifest: Manifest = {}
        self._places: list[Tensor] = []
        at = 0
        for (name, tensor), size in zip(weights.items(), sizes, strict=True):
            shape, kind = tuple(tensor.shape), kinds[name]
            part = torch.from_numpy(self._data[at : at + size])
            self._places.append(part.view(kind).view(shape) if size else torch.empty(shape, dtype=kind))
            self._manifest[name] = shape, _NAMES[kind]
            at += _aligned(size)

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Copies and casts ``weights``, the same as ever and from any device, over what was here."""
        torch._foreach_copy_(self._places, [weights[name] for name in self._manifest])

    def parcel(self, version: int) -> Parcel:
        """What is here as ``version``, ready to travel. Nothing is copied: fill it again once nobody reads it."""
        return version, self._manifest, _checksum(self._data.data), PickleBuffer(self._data.data)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes


def pack_weights(version: int, weights: Mapping[str, Tensor]) -> Parcel:
    """A copy of ``weights`` as ``version``."""
    block = WeightBlock(weights)
    block.fill(weights)
    return block.parcel(version)


def unpack_weights(parcel: Parcel) -> dict[str, Tensor]:
    """The tensors of a parcel, verified; views of its memory. Raises ModelError for truncated or altered bytes."""
    _, manifest, checksum, data = parcel
    block = np.frombuffer(data, np.uint8)
    if (size := _size(manifest)) != len(block):
        raise ModelError(f"published weights are partial: {len(block)} bytes, {size} by their manifest")
    if _checksum(block.data) != checksum:
        raise ModelError("published weights are corrupt (checksum differs): the version is refused")
    weights: dict[str, Tensor] = {}
    at = 0
    with warnings.catch_warnings():  # the store's pages are read-only; nobody writes to these tensors
        warnings.simplefilter("ignore", UserWarning)
        for name, (shape, kind) in manifest.items():
            dtype, count = _TYPES[kind], math.prod(shape)
            if count:
                weights[name] = torch.frombuffer(block, dtype=dtype, count=count, offset=at).view(shape)
            else:
                weights[name] = torch.empty(shape, dtype=dtype)
            at += _aligned(count * dtype.itemsize)
    return weights


def _size(manifest: Manifest) -> int:
    return sum(_aligned(math.prod(shape) * _TYPES[kind].itemsize) for shape, kind in manifest.values())


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
