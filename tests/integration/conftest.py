"""A Redis for each test module, a buffer on it that is empty for each test, and a cache for all
small runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
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


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """World and tiny model for ``tests.small_run``: made by whoever comes first, of all workers of
    this session."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small-cache"


@pytest.fixture
def without_ray_token() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch, with ``RAY_AUTH_MODE`` and tokens taken away. Ray keeps what it has read of
    them, so it reads again once they are back: the next test that starts Ray in this process would
    otherwise have a server with a token and a client without one.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        yield patch
    if "ray" in sys.modules:
        native = importlib.import_module("ray._raylet")
        native.Config.initialize("")
        native.AuthenticationTokenLoader.instance().reset_cache()
