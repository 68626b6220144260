"""Weights as bytes: what the learner hands to the weight board, and the proof with which rollout actors take it."""

from __future__ import annotations

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

#: Of one published tensor: shape, type as torch names it without the prefix ("bfloat16"), checksum (XXH3, 64 bits:
#: against damage, not against malice, and as fast as memory). A plain tuple, which costs least to make and to pickle.
TensorSpec = tuple[tuple[int, ...], str, int]
Manifest = dict[str, TensorSpec]
Arrays = dict[str, NDArray[Any]]
#: A version as it travels: (version, manifest, the bytes in the manifest's order). Plain tuples and bare buffers, which
#: pickle at once; some hundred objects of classes of our own took longer than 10 MB of weights.
Parcel = tuple[int, Manifest, list[Any]]

_TYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_NAMES = {kind: name for name, kind in _TYPES.items()}
#: For types numpy does not know: another of the same size.
_STAND_INS = {
    kind: torch.int16 if kind.itemsize == 2 else torch.uint8
    for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
}


def pack_weights(weights: Mapping[str, Tensor]) -> tuple[Manifest, Arrays]:
    """Flat byte arrays (zero-copy in the object store) and the manifest that proves them."""
    manifest: Manifest = {}
    arrays: Arrays = {}
    for name, tensor in weights.items():
        raw = arrays[name] = _raw(tensor)
        manifest[name] = (tuple(tensor.shape), _NAMES[tensor.dtype], _checksum(raw.data))
    return manifest, arrays


def _raw(tensor: Tensor) -> NDArray[Any]:
    """The bytes of ``tensor``, a view of its memory where that is possible."""
    # Hundreds of tensors: at 10 MB, six of torch's calls for each took longer than the checksums of their bytes.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    if (stand_in := _STAND_INS.get(tensor.dtype)) is not None:
        tensor = tensor.view(stand_in)
    return tensor.numpy().ravel().view(np.uint8)  # type: ignore[no-any-return]


def unpack_weights(manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Tensors again, verified. Raises ModelError for a missing, truncated or altered tensor."""
    if manifest.keys() != arrays.keys():
        odd = sorted(manifest.keys() ^ arrays.keys())
        raise ModelError(
            f"published weights are partial: {len(odd)} tensors differ from the manifest, first {odd[0]!r}"
        )
    weights = {}
    with warnings.catch_warnings():  # the store's pages are read-only; nobody writes to these tensors
        warnings.simplefilter("ignore", UserWarning)
        for name, (shape, kind, checksum) in manifest.items():
            raw, dtype = arrays[name], _TYPES[kind]
            if _checksum(raw.data) != checksum:
                raise ModelError(f"published tensor {name!r} is corrupt (checksum differs): the version is refused")
            tensor = torch.frombuffer(raw, dtype=dtype) if raw.size else torch.empty(0, dtype=dtype)
            weights[name] = tensor.view(shape)
    return weights


def to_parcel(version: int, manifest: Manifest, arrays: Arrays) -> Parcel:
    """``version`` ready to travel; nothing is copied."""
    return version, manifest, [PickleBuffer(array.data) for array in arrays.values()]


def from_parcel(parcel: Parcel) -> tuple[int, Manifest, Arrays]:
    """What ``to_parcel`` was given, its arrays views of the parcel's memory."""
    version, manifest, buffers = parcel
    arrays = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
    return version, manifest, dict(zip(manifest, arrays, strict=False))  # `unpack_weights` says what is missing
