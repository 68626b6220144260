"""Weights through real Ray processes: they outlive their publisher, are heard of at once, and
damage is refused."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights import receiver as pulling
from avatar_rl.buffer_service.weights.block import pack_weights
from avatar_rl.buffer_service.weights.receiver import MAX_REFUSED, WeightReceiver
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.buffer_service.weights.store import WeightStore
from avatar_rl.common.errors import ModelError

SIZE = 1 << 20  # elements: far above what Ray sends inline


class Source:
    """A learner's rank 0, as far as publishing goes."""

    def __init__(self, weight_store: Any) -> None:
        self.outbox = Outbox(weight_store)
        self.sender = WeightSender(
            {"w": torch.empty(SIZE, device="meta")}, self.outbox, dtype="float32"
        )

    def publish(self, version: int) -> int:
        return self.sender.publish(version, [{"w": torch.full((SIZE,), float(version))}])

    def again(self) -> int:
        return self.sender.put_again()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20
    )
    yield
    ray.shutdown()


@pytest.fixture
def weight_store(cluster: None) -> Any:
    return ray.remote(WeightStore).options(num_cpus=0).remote()


@pytest.fixture
def source(weight_store: Any) -> Any:
    return ray.remote(Source).options(num_cpus=0, max_concurrency=4).remote(weight_store)


def test_a_version_outlives_the_learner_that_published_it(weight_store: Any, source: Any) -> None:
    assert ray.get(source.publish.remote(1)) == 4 * SIZE
    assert until_fetched(WeightReceiver(weight_store, 0))[0] == 1
    ray.kill(source)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(source.publish.remote(2))
    fetched = WeightReceiver(weight_store, 0).fetch()
    assert fetched is not None and fetched[0] == 1
    assert torch.equal(fetched[1]["w"], torch.full((SIZE,), 1.0))


def test_a_receiver_that_waits_hears_of_the_next_version_and_skips_those_between(
    weight_store: Any, source: Any
) -> None:
    ray.get(source.publish.remote(1))
    receiver = WeightReceiver(weight_store, 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(until_fetched, receiver)
        time.sleep(3 * pulling.WAIT_S)
        assert not waiting.done()
        ray.get(source.publish.remote(2))
        assert waiting.result(30) == (2, 2.0)
    ray.get(
        [source.publish.remote(version) for version in (3, 4)], timeout=60
    )  # at once: they take turns
    fetched = until_fetched(receiver)
    assert fetched in [(3, 3.0), (4, 4.0)]
    if fetched[0] == 3:
        assert until_fetched(receiver) == (4, 4.0)
    assert receiver.fetch() is None  # nothing newer
    assert until_fetched(WeightReceiver(weight_store, 0)) == (4, 4.0)  # who joins late


def test_a_damaged_version_is_refused_counted_and_taken_once_it_is_published_anew(
    weight_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "RETRY_S", 0.01)
    weights = {"w": torch.ones(SIZE), "none": torch.zeros(0, 3), "last": torch.ones(2)}
    message = pack_weights(1, weights)
    wrong = message._replace(checksum=message.checksum ^ 1)
    ray.get(weight_store.publish.remote(wrong))
    receiver = WeightReceiver(weight_store, 0)
    assert receiver.fetch() is None and receiver.fetch() is None
    assert (receiver.refused, receiver.version) == (2, 0)
    ray.get(weight_store.publish.remote(message))
    fetched = receiver.fetch()
    assert fetched is not None and fetched[0] == 1 and receiver.refused == 2
    assert fetched[1]["w"].sum() == SIZE and fetched[1]["none"].shape == (0, 3)
    short = pickle.PickleBuffer(memoryview(message.block)[:-64])
    ray.get(weight_store.publish.remote(message._replace(version=2, block=short)))
    assert receiver.fetch() is None and receiver.refused == 3
    ray.get(weight_store.publish.remote(wrong._replace(version=2)))
    for _ in range(MAX_REFUSED - 2):
        assert receiver.fetch() is None
    with pytest.raises(ModelError, match=r"after 1 cannot be adopted.*checksum differs"):
        receiver.fetch()


def test_a_version_is_handed_on_once_it_is_committed_and_fetched_anew_when_it_never_was(
    weight_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "COMMIT_S", 0.3)

    def publish(value: float) -> None:
        ray.get(weight_store.publish.remote(pack_weights(1, {"w": torch.full((4,), value)})))

    with (
        EmbeddedRedis(tmp_path / "redis") as redis,
        ReplayBuffer.connect(BufferConfig(), "weights", redis.url) as buffer,
        ThreadPoolExecutor(1) as pool,
    ):
        updates = WeightReceiver(weight_store, 0).updates(buffer, lambda: True)
        publish(1.0)
        waiting = pool.submit(next, updates)
        with pytest.raises(TimeoutError):
            waiting.result(1.0)  # its learner failed before the commit ...
        publish(5.0)  # ... and trained the step again
        time.sleep(0.5)
        buffer.replay.publish_version(1)
        version, weights = waiting.result(30)
        assert (version, weights["w"].tolist()) == (1, [5.0] * 4)


def test_a_publisher_that_dies_leaves_the_version_before_and_its_successor_is_heard(
    weight_store: Any, source: Any
) -> None:
    ray.get(source.publish.remote(1))
    receiver = WeightReceiver(weight_store, 0)
    assert until_fetched(receiver) == (1, 1.0)
    assert receiver.fetch() is None  # it waits for what the source will never publish
    ray.kill(source)
    assert receiver.fetch() is None and receiver.refused == 0
    version, _ = ray.get(weight_store.latest.remote(0))
    assert version == 1
    heir = ray.remote(Source).options(num_cpus=0, max_concurrency=4).remote(weight_store)
    ray.get(heir.publish.remote(2))
    assert until_fetched(receiver) == (2, 2.0)


def test_a_weight_store_that_dies_comes_back_empty_and_is_given_the_newest_version(
    cluster: None,
) -> None:
    weight_store = (
        ray.remote(WeightStore).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    )
    source = ray.remote(Source).options(num_cpus=0, max_concurrency=4).remote(weight_store)
    assert ray.get(source.again.remote()) == 0  # nothing yet
    ray.get(source.publish.remote(1))
    receiver = WeightReceiver(weight_store, 1)
    assert receiver.fetch() is None
    ray.kill(weight_store, no_restart=False)
    until_empty(weight_store)
    assert ray.get(source.again.remote(), timeout=60) == 1
    assert until_fetched(WeightReceiver(weight_store, 0)) == (1, 1.0)
    ray.kill(weight_store, no_restart=False)
    until_empty(weight_store)
    ray.get(source.publish.remote(2), timeout=60)  # nobody takes it ...
    ray.get(source.publish.remote(3), timeout=60)  # ... which it finds out by itself
    assert until_fetched(receiver)[0] in (2, 3) and receiver.refused == 0


def until_fetched(receiver: WeightReceiver) -> tuple[int, float]:
    """The next version and the value of its tensor, waited for as a rollout actor's thread does."""
    deadline = time.monotonic() + 30
    while (fetched := receiver.fetch()) is None:
        assert time.monotonic() < deadline
    return fetched[0], float(fetched[1]["w"].mean())


def until_empty(weight_store: Any) -> None:
    """A killed weight store has been restarted."""
    deadline = time.monotonic() + 60
    while not ray.get(weight_store.lost.remote(1), timeout=60):
        assert time.monotonic() < deadline
        time.sleep(0.05)
