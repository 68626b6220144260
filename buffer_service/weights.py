"""Weights as bytes: what the learner hands to the weight board, and the proof with which rollout actors take it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pickle import PickleBuffer
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from prompts.errors import ModelError


class TensorSpec(NamedTuple):
    """Shape, type and checksum of one published tensor."""

    shape: tuple[int, ...]
    dtype: str  # torch's name without the prefix: "float32", "bfloat16"
    xxh3: int  # 64 bits; against damage, not against malice, and as fast as memory


Manifest = dict[str, TensorSpec]
Arrays = dict[str, NDArray[Any]]
#: A version as it travels: (version, {name: spec}, the bytes in the manifest's order). Plain tuples and bare buffers,
#: which pickle at once; some hundred objects of classes of our own took longer than 10 MB of weights.
Parcel = tuple[int, dict[str, tuple[Any, ...]], list[Any]]


def pack_weights(weights: Mapping[str, Tensor]) -> tuple[Manifest, Arrays]:
    """Flat byte arrays (zero-copy in the object store) and the manifest that proves them."""
    manifest: Manifest = {}
    arrays: Arrays = {}
    for name, tensor in weights.items():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = xxhash.xxh3_64_intdigest(raw.data)
        manifest[name] = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest)
        arrays[name] = raw
    return manifest, arrays


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
        for name, spec in manifest.items():
            raw = np.asarray(arrays[name])
            if xxhash.xxh3_64_intdigest(raw.data) != spec.xxh3:
                raise ModelError(f"published tensor {name!r} is corrupt (checksum differs): the version is refused")
            tensor = torch.from_numpy(raw) if raw.size else torch.empty(0, dtype=torch.uint8)  # no stride to view by
            weights[name] = tensor.view(getattr(torch, spec.dtype)).reshape(spec.shape)
    return weights


def to_parcel(version: int, manifest: Manifest, arrays: Arrays) -> Parcel:
    """``version`` ready to travel; nothing is copied."""
    return (
        version,
        {name: tuple(spec) for name, spec in manifest.items()},
        [PickleBuffer(a.data) for a in arrays.values()],
    )


def from_parcel(parcel: Parcel) -> tuple[int, Manifest, Arrays]:
    """What ``to_parcel`` was given, its arrays views of the parcel's memory."""
    version, specs, buffers = parcel
    manifest = {name: TensorSpec(*spec) for name, spec in specs.items()}
    arrays = [np.asarray(memoryview(buffer).cast("B")) for buffer in buffers]
    return version, manifest, dict(zip(manifest, arrays, strict=False))  # `unpack_weights` says what is missing
