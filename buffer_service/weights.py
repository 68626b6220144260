"""The weight board: where the learner leaves a policy version and rollout actors pull it from (DESIGN 2, step 5 and 6).

Learner and rollout actors never call each other; both know only this actor. Tensors travel through the Ray object
store (one transfer per node); the board holds the references and the manifests.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompts.errors import ModelError


@dataclass(frozen=True)
class TensorSpec:
    """Shape, type and checksum of one published tensor."""

    shape: tuple[int, ...]
    dtype: str  # torch's name without the prefix: "float32", "bfloat16"
    crc32: int


Manifest = dict[str, TensorSpec]


def pack_weights(weights: Mapping[str, Tensor]) -> tuple[Manifest, dict[str, NDArray[Any]]]:
    """Flat byte arrays (zero-copy in the object store) and the manifest that proves them."""
    manifest: Manifest = {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in weights.items():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        manifest[name] = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), zlib.crc32(raw.data))
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
    for name, spec in manifest.items():
        raw = np.asarray(arrays[name])
        if zlib.crc32(raw.data) != spec.crc32:
            raise ModelError(f"published tensor {name!r} is corrupt (checksum differs): the version is refused")
        with warnings.catch_warnings():  # the store's pages are read-only; nobody writes to these tensors
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(raw) if raw.size else torch.empty(0, dtype=torch.uint8)  # no stride to view by
        weights[name] = tensor.view(getattr(torch, spec.dtype)).reshape(spec.shape)
    return weights


class WeightBoard:
    """Plain class; the cluster makes it a Ray actor. Keeps the newest ``keep`` versions alive."""

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self.versions: dict[int, tuple[Manifest, list[Any]]] = {}

    def publish(self, version: int, manifest: Manifest, arrays: dict[str, NDArray[Any]]) -> None:
        """Keep ``arrays`` as ``version``: copied into an object of our own, since a learner's dies with the learner."""
        import ray

        if self.versions and version < max(self.versions):
            return  # a learner that was declared dead; versions only grow
        self.versions[version] = (manifest, [ray.put(arrays)])
        for old in sorted(self.versions)[: -self.keep]:
            del self.versions[old]

    def latest(self, newer_than: int) -> tuple[int, Manifest, list[Any]] | None:
        """The newest version above ``newer_than``, or None; its reference in a list, so that Ray hands on no value."""
        newest = max(self.versions, default=-1)
        return (newest, *self.versions[newest]) if newest > newer_than else None
