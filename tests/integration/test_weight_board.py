"""Weights through real Ray processes: they outlive their publisher, are heard of at once, and damage is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors import weights as pulling
from actors.weights import MAX_REFUSED, WeightPuller
from buffer_service.config import BufferConfig
from buffer_service.server import EmbeddedRedis
from buffer_service.store import ReplayBuffer
from buffer_service.weights import WeightBoard, pack_weights
from learner.publisher import Publisher
from prompts.errors import ModelError

SIZE = 1 << 20  # elements: far above what Ray sends inline


class Source:
    """A learner's rank 0, as far as publishing goes."""

    def __init__(self, board: Any) -> None:
        self.publisher = Publisher.__new__(Publisher)  # without a checkpoint to take the names from
        self.publisher.mapping, self.publisher.board = {"w": "w"}, board
        self.publisher.dtype, self.publisher.outgoing = torch.float32, {}
        self.publisher.turn = threading.Lock()

    def publish(self, version: int) -> int:
        return self.publisher.publish(version, {"w": torch.full((SIZE,), float(version))})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def board(cluster: None) -> Any:
    return ray.remote(WeightBoard).options(num_cpus=0).remote()


@pytest.fixture
def source(board: Any) -> Any:
    return ray.remote(Source).options(num_cpus=0, max_concurrency=4).remote(board)


def test_a_version_outlives_the_learner_that_published_it(board: Any, source: Any) -> None:
    assert ray.get(source.publish.remote(1)) == 4 * SIZE
    ray.kill(source)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(source.publish.remote(2))
    fetched = WeightPuller(board, 0).fetch()
    assert fetched is not None and fetched[0] == 1
    assert torch.equal(fetched[1]["w"], torch.full((SIZE,), 1.0))


def test_whoever_waits_hears_of_the_next_version_and_skips_those_between(board: Any, source: Any) -> None:
    waiting = board.newer.remote(0, 60.0)
    assert ray.wait([waiting], timeout=0.3)[0] == []
    ray.get(source.publish.remote(1))
    assert ray.get(waiting, timeout=30)[0] == 1
    ray.get([source.publish.remote(version) for version in (2, 3)], timeout=60)  # at once: they take turns
    puller = WeightPuller(board, 1)
    fetched = puller.fetch()
    assert fetched is not None and fetched[0] == 3 == puller.version
    assert puller.fetch() is None  # nothing newer


def test_a_damaged_version_is_refused_counted_and_taken_once_it_is_published_anew(
    board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "RETRY_S", 0.01)
    manifest, arrays = pack_weights({"w": torch.ones(SIZE)})
    wrong = {"w": replace(manifest["w"], xxh3=manifest["w"].xxh3 ^ 1)}
    ray.get(board.publish.remote(1, wrong, arrays))
    puller = WeightPuller(board, 0)
    assert puller.fetch() is None and puller.fetch() is None
    assert (puller.refused, puller.version) == (2, 0)
    ray.get(board.publish.remote(1, manifest, arrays))
    fetched = puller.fetch()
    assert fetched is not None and fetched[0] == 1 and puller.refused == 2
    ray.get(board.publish.remote(2, wrong, arrays))
    for _ in range(MAX_REFUSED - 1):
        assert puller.fetch() is None
    with pytest.raises(ModelError, match=r"version 2 cannot be adopted.*checksum differs"):
        puller.fetch()


def test_a_version_is_handed_on_once_it_is_committed_and_fetched_anew_when_it_never_was(
    board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "COMMIT_S", 0.3)
    with (
        EmbeddedRedis(tmp_path / "redis") as redis,
        ReplayBuffer.connect(BufferConfig(), "weights", redis.url) as buffer,
        ThreadPoolExecutor(1) as pool,
    ):
        updates = WeightPuller(board, 0).updates(buffer, lambda: True)
        ray.get(board.publish.remote(1, *pack_weights({"w": torch.full((4,), 1.0)})))
        waiting = pool.submit(next, updates)
        with pytest.raises(TimeoutError):
            waiting.result(1.0)  # its learner failed before the commit ...
        ray.get(board.publish.remote(1, *pack_weights({"w": torch.full((4,), 5.0)})))  # ... and trained the step again
        time.sleep(0.5)
        buffer.publish_version(1)
        version, weights = waiting.result(30)
        assert (version, weights["w"].tolist()) == (1, [5.0] * 4)


def test_a_publisher_that_dies_in_between_leaves_the_version_before(board: Any, source: Any) -> None:
    ray.get(source.publish.remote(1))
    manifest, _ = pack_weights({"w": torch.zeros(SIZE)})
    ray.kill(source)
    taking = board.take.remote(2, manifest, [source])  # announced, never handed over
    with pytest.raises((ray.exceptions.RayError, ModelError)):
        ray.get(taking, timeout=30)
    version, *_ = ray.get(board.latest.remote(0))
    assert version == 1
