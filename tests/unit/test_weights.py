"""The weight store: bit-exact, proven by checksums, and versions only grow."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.buffer_service.weights.block import WeightBlock, pack_weights, unpack_weights
from avatar_rl.buffer_service.weights.receiver import is_finite
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.buffer_service.weights.store import Manifest, WeightMessage, WeightStore
from avatar_rl.common.errors import ModelError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, generator=generator)
    return {
        "float32": torch.tensor([1.5, -0.0, float("nan"), float("inf"), 1e-42]),
        "bfloat16": wide.bfloat16(),
        "float16": wide.half(),
        "float8": wide.to(torch.float8_e4m3fn),
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
    message = pack_weights(7, weights)
    assert message.version == 7 and memoryview(message.block).nbytes == sum(
        -(-t.nbytes // 64) * 64 for t in weights.values()
    )
    again = unpack_weights(message)
    assert list(again) == list(weights)
    for name, tensor in weights.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert bits(again[name]) == bits(tensor)


def test_a_block_is_filled_again_and_casts_what_has_a_floating_type() -> None:
    weights = tensors()
    block = WeightBlock(weights, torch.bfloat16)
    before = np.frombuffer(block.message(0).block, np.uint8)
    for version in (1, 2):
        moved = {
            name: (tensor.detach().double() + version).to(tensor.dtype)
            for name, tensor in weights.items()
        }
        block.fill(moved)
        again = unpack_weights(message := block.message(version))
        for name, tensor in moved.items():
            assert again[name].dtype == (torch.int64 if name == "integers" else torch.bfloat16)
            assert bits(again[name]) == bits(tensor.to(again[name].dtype))
        assert np.shares_memory(np.frombuffer(message.block, np.uint8), before)
    block.fill(weights)  # parameters themselves
    assert not any(tensor.requires_grad for tensor in unpack_weights(block.message(3)).values())


def test_a_message_travels_without_a_copy_and_comes_back_as_it_was() -> None:
    message = pack_weights(7, tensors())
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1000 and len(buffers) == 1
    again = pickle.loads(data, buffers=buffers)
    assert again[:3] == message[:3]
    assert np.shares_memory(
        np.frombuffer(again.block, np.uint8), np.frombuffer(message.block, np.uint8)
    )
    found = unpack_weights(again)
    start = np.frombuffer(message.block, np.uint8).ctypes.data
    assert all(
        0 <= t.data_ptr() - start < memoryview(message.block).nbytes
        for t in found.values()
        if t.numel()
    )


def test_a_read_only_block_unpacks_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    message = pack_weights(1, {"w": torch.ones(3)})
    read_only = memoryview(message.block).toreadonly()  # as the object store hands it out
    assert unpack_weights(message._replace(block=read_only))["w"].tolist() == [1, 1, 1]
    assert not recwarn.list


def _flip(manifest: Manifest, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    block[64 + 5] ^= 1
    return block


def _truncate(manifest: Manifest, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return block[:-64]


def _cut_short(manifest: Manifest, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return block[:-1]


def _empty(manifest: Manifest, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return block[:0]


def _forget(manifest: Manifest, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    del manifest["float16"]
    return block


def _enlarge(manifest: Manifest, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    manifest["integers"] = ((70,), "int64")
    return block


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_flip, r"weights are corrupt \(checksum differs\)"),
        (_truncate, "partial: 704 bytes, 768 by"),
        (_cut_short, "partial: 767 bytes, 768 by"),
        (_empty, "partial: 0 bytes, 768 by"),
        (_forget, "partial: 768 bytes, 704 by"),
        (_enlarge, "partial: 768 bytes, 1280 by"),
    ],
)
def test_corrupt_and_partial_weights_are_refused(
    spoil: Callable[[Manifest, NDArray[np.uint8]], NDArray[np.uint8]], message: str
) -> None:
    good = pack_weights(1, tensors())
    block = spoil(good.manifest, np.frombuffer(good.block, np.uint8))
    with pytest.raises(ModelError, match=message):
        unpack_weights(good._replace(block=memoryview(block)))


class Offered:
    """Stands in for the outbox: what was put out, and how much of it the weight store had
    before."""

    def __init__(self) -> None:
        self.messages: list[WeightMessage] = []
        self.awaited = 0

    def await_taken(self) -> None:
        self.awaited = len(self.messages)

    def put(self, message: WeightMessage) -> None:
        assert self.awaited == len(
            self.messages
        )  # or the block that is written to might still be read
        self.messages.append(message)


def test_a_version_stays_as_it_was_published_until_the_one_after_was_taken() -> None:
    outbox = Offered()
    sender = WeightSender(
        {"w": torch.empty(3, device="meta"), "ids": torch.empty(2, dtype=torch.int64)},
        cast("Outbox", outbox),
        dtype="bfloat16",
    )
    weight = torch.nn.Parameter(torch.zeros(3))
    for version in (1, 2, 3):
        with torch.no_grad():
            weight += 1
        ids = torch.tensor([version, 2**40])
        assert sender.publish(version, iter([{"w": weight}, {"ids": ids}])) == 128
        for message in outbox.messages[-2:]:
            found = unpack_weights(message)
            assert (
                list(found) == ["w", "ids"]
                and found["w"].tolist() == [message.version] * 3
                and found["ids"].tolist() == [message.version, 2**40]
            )
            assert found["w"].dtype == torch.bfloat16
    where = [np.frombuffer(message.block, np.uint8).ctypes.data for message in outbox.messages]
    assert where[0] == where[2] != where[1]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"w": torch.zeros(3)}], r"version 1 lacks 1 tensors, first 'b'"),
        ([{"w": torch.zeros(3)}, {"w": torch.zeros(3)}], r"'w' is not in .* or comes twice"),
        ([{"x": torch.zeros(3)}], r"'x' is not in the published checkpoint"),
    ],
)
def test_an_incomplete_version_is_not_offered(
    parts: list[dict[str, torch.Tensor]], message: str
) -> None:
    outbox = Offered()
    layout = {"w": torch.empty(3), "b": torch.empty(1)}
    sender = WeightSender(layout, cast("Outbox", outbox), dtype="float32")
    with pytest.raises(ModelError, match=message):
        sender.publish(1, parts)
    assert outbox.messages == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_only_nan_and_infinity_are_not_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert is_finite(torch.full((4096,), most, dtype=dtype))  # their sum is infinite
    assert is_finite(torch.zeros(0, 3, dtype=dtype))
    assert is_finite(torch.tensor(-most, dtype=dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 31, 4095):
            tensor = torch.ones(64, 64, dtype=dtype)
            tensor.view(-1)[place] = bad
            assert not is_finite(tensor) and not is_finite(tensor.T)


@pytest.fixture
def weight_store(monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    """A weight store whose object store is the process's own memory."""
    monkeypatch.setattr(ray, "put", lambda value: ("reference", value))
    return WeightStore()


def publish(weight_store: WeightStore, version: int, number: float | None = None) -> None:
    weights = {"w": torch.full((2,), float(version) if number is None else number)}
    weight_store.publish(pack_weights(version, weights))


def value(weight_store: WeightStore, newer_than: int) -> tuple[int, list[float]] | None:
    found = weight_store.latest(newer_than)
    if found is None:
        return None
    version, [reference] = found
    assert reference[1].version == version
    return version, unpack_weights(reference[1])["w"].tolist()


def test_an_actor_pulls_the_newest_version_or_nothing(weight_store: WeightStore) -> None:
    assert value(weight_store, -1) is None
    for version in (1, 2, 5):
        publish(weight_store, version)
        assert value(weight_store, 0) == (version, [version, version])
    assert value(weight_store, 4) == (5, [5, 5])
    assert value(weight_store, 5) is None


def test_versions_only_grow_and_two_are_kept(weight_store: WeightStore) -> None:
    for version in (1, 2, 3):
        publish(weight_store, version)
    assert sorted(weight_store.versions) == [2, 3]
    publish(weight_store, 1)  # a learner that had been declared dead
    assert sorted(weight_store.versions) == [2, 3]
    assert value(weight_store, 0) == (3, [3, 3])


def test_a_step_repeated_after_a_crash_replaces_its_own_version(weight_store: WeightStore) -> None:
    publish(weight_store, 1)
    publish(weight_store, 1, 9.0)
    assert value(weight_store, 0) == (1, [9, 9])
