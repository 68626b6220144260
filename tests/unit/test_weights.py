"""The weight board: bit-exact, proven by checksums, and versions only grow."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from buffer_service.board import WeightBoard
from buffer_service.weights import from_parcel, pack_weights, to_parcel, unpack_weights
from prompts.errors import ModelError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, generator=generator)
    return {
        "float32": torch.tensor([1.5, -0.0, float("nan"), float("inf"), 1e-42]),
        "bfloat16": wide.bfloat16(),
        "float16": wide.half(),
        "transposed": wide.T,
        "sliced": wide[:, ::2],
        "scalar": torch.tensor(3.25),
        "scalar bfloat16": torch.tensor(-0.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "integers": torch.arange(7),
        "needs gradient": torch.nn.Parameter(wide.clone()),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_is_packed_comes_back_bit_for_bit() -> None:
    weights = tensors()
    manifest, arrays = pack_weights(weights)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.uint8)}
    assert [array.nbytes for array in arrays.values()] == [t.nbytes for t in weights.values()]
    again = unpack_weights(manifest, arrays)
    assert list(again) == list(weights)
    for name, tensor in weights.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert bits(again[name]) == bits(tensor)


def test_a_parcel_travels_without_a_copy_and_comes_back_as_it_was() -> None:
    manifest, arrays = pack_weights(tensors())
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(to_parcel(7, manifest, arrays), protocol=5, buffer_callback=buffers.append)
    assert len(data) < 2000 and len(buffers) == len(arrays)
    version, specs, again = from_parcel(pickle.loads(data, buffers=buffers))
    assert (version, specs, list(again)) == (7, manifest, list(arrays))
    assert all(np.shares_memory(again[name], arrays[name]) for name in arrays if arrays[name].size)
    assert list(unpack_weights(specs, again)) == list(arrays)


def test_read_only_arrays_unpack_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    manifest, arrays = pack_weights({"w": torch.ones(3)})
    arrays["w"].setflags(write=False)  # as the object store hands them out
    assert unpack_weights(manifest, arrays)["w"].tolist() == [1, 1, 1]
    assert not recwarn.list


def _flip(arrays: dict[str, Any]) -> None:
    arrays["bfloat16"][5] ^= 1


def _truncate(arrays: dict[str, Any]) -> None:
    arrays["float16"] = arrays["float16"][:-2]


def _drop(arrays: dict[str, Any]) -> None:
    del arrays["scalar"]


def _add(arrays: dict[str, Any]) -> None:
    arrays["stranger"] = np.zeros(4, dtype=np.uint8)


def _empty(arrays: dict[str, Any]) -> None:
    arrays["integers"] = arrays["integers"][:0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_flip, "'bfloat16' is corrupt"),
        (_truncate, "'float16' is corrupt"),
        (_empty, "'integers' is corrupt"),
        (_drop, "partial: 1 tensors differ from the manifest, first 'scalar'"),
        (_add, "partial: 1 tensors differ from the manifest, first 'stranger'"),
    ],
)
def test_corrupt_and_partial_weights_are_refused(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    manifest, arrays = pack_weights(tensors())
    arrays = {name: array.copy() for name, array in arrays.items()}
    spoil(arrays)
    with pytest.raises(ModelError, match=message):
        unpack_weights(manifest, arrays)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> WeightBoard:
    """A board whose object store is the process's own memory."""
    monkeypatch.setattr(ray, "put", lambda value: ("reference", value))
    return WeightBoard()


def publish(board: WeightBoard, version: int, number: float | None = None) -> None:
    weights = {"w": torch.full((2,), float(version) if number is None else number)}
    board.publish(to_parcel(version, *pack_weights(weights)))


def value(board: WeightBoard, newer_than: int) -> tuple[int, list[float]] | None:
    found = board.latest(newer_than)
    if found is None:
        return None
    version, [reference] = found
    inside, manifest, arrays = from_parcel(reference[1])
    assert inside == version
    return version, unpack_weights(manifest, arrays)["w"].tolist()


def test_an_actor_pulls_the_newest_version_or_nothing(board: WeightBoard) -> None:
    assert value(board, -1) is None
    for version in (1, 2, 5):
        publish(board, version)
        assert value(board, 0) == (version, [version, version])
    assert value(board, 4) == (5, [5, 5])
    assert value(board, 5) is None


def test_versions_only_grow_and_two_are_kept(board: WeightBoard) -> None:
    for version in (1, 2, 3):
        publish(board, version)
    assert sorted(board.versions) == [2, 3]
    publish(board, 1)  # a learner that had been declared dead
    assert sorted(board.versions) == [2, 3]
    assert value(board, 0) == (3, [3, 3])


def test_a_step_repeated_after_a_crash_replaces_its_own_version(board: WeightBoard) -> None:
    publish(board, 1)
    publish(board, 1, 9.0)
    assert value(board, 0) == (1, [9, 9])
