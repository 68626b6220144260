"""The weight board: where the learner leaves a policy version and rollout actors pull it from (DESIGN 2, step 5 and 6).

Learner and rollout actors never call each other; both know only this actor. Tensors travel through the Ray object
store (one transfer per node); the board holds the references and the manifests.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from prompts.errors import ModelError

TAKE_S = 600.0  # one copy within a machine; this long only when the object store has to spill


@dataclass(frozen=True)
class TensorSpec:
    """Shape, type and checksum of one published tensor."""

    shape: tuple[int, ...]
    dtype: str  # torch's name without the prefix: "float32", "bfloat16"
    xxh3: int  # 64 bits; against damage, not against malice, and as fast as memory


Manifest = dict[str, TensorSpec]
Arrays = dict[str, NDArray[Any]]


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


def hand_over(source: Any) -> tuple[int, Arrays]:
    """Runs inside the publishing actor: what its ``publisher`` has put out for the board, and how many tensors."""
    return len(source.publisher.outgoing), source.publisher.outgoing


class WeightBoard:
    """Plain class; the cluster makes it an asynchronous Ray actor. Keeps the newest ``keep`` versions alive."""

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self.versions: dict[int, tuple[Manifest, list[Any]]] = {}
        self._grown = asyncio.Event()

    def publish(self, version: int, manifest: Manifest, arrays: Arrays) -> None:
        """Keep ``arrays`` as ``version``: copied into an object of our own, since a publisher's dies with it."""
        import ray

        if not self._stale(version):
            self._keep(version, manifest, ray.put(arrays))

    async def take(self, version: int, manifest: Manifest, source: list[Any]) -> None:
        """Keep what the actor ``source[0]`` hands over as ``version`` (see ``hand_over``).

        What an actor returns belongs to the caller: the bytes are copied once, into the publisher's own node, and still
        outlive the publisher. Raises ModelError when it does not answer, and Ray's error when it has died.
        """
        if self._stale(version):
            return
        answer, reference = source[0].__ray_call__.options(num_returns=2).remote(hand_over)
        try:
            await asyncio.wait_for(answer, TAKE_S)  # says that it went well, without fetching the tensors
        except TimeoutError as error:
            raise ModelError(f"version {version} was announced and not handed over within {TAKE_S:g} s") from error
        if not self._stale(version):
            self._keep(version, manifest, reference)

    def latest(self, newer_than: int) -> tuple[int, Manifest, list[Any]] | None:
        """The newest version above ``newer_than``, or None; its reference in a list, so that Ray hands on no value."""
        newest = max(self.versions, default=-1)
        return (newest, *self.versions[newest]) if newest > newer_than else None

    async def newer(self, newer_than: int, wait_s: float) -> tuple[int, Manifest, list[Any]] | None:
        """``latest``, waited for up to ``wait_s`` seconds: whoever asks hears at once instead of asking again."""
        found = self.latest(newer_than)
        if found is None:
            try:
                await asyncio.wait_for(self._grown.wait(), wait_s)
            except TimeoutError:
                return None
            found = self.latest(newer_than)
        return found

    def _stale(self, version: int) -> bool:
        """From a learner that was declared dead: versions only grow."""
        return bool(self.versions) and version < max(self.versions)

    def _keep(self, version: int, manifest: Manifest, reference: Any) -> None:
        self.versions[version] = (manifest, [reference])
        for old in sorted(self.versions)[: -self.keep]:
            del self.versions[old]
        self._grown.set()
        self._grown = asyncio.Event()
