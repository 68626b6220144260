"""A Redis for each test module, and a buffer on it that is empty for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from buffer_service.server import EmbeddedRedis
from buffer_service.store import ReplayBuffer
from tests.buffer_records import CONFIG


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), persistent=False) as running:
        yield running


@pytest.fixture
def buffer(server: EmbeddedRedis) -> Iterator[ReplayBuffer]:
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(CONFIG, "run", server.url) as connected:
        yield connected
