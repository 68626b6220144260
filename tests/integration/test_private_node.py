"""A local run listens on loopback only, whatever the machine's address is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.services.services import LOOPBACK, Services, free_port
from avatar_rl.common.errors import ResourceError
from avatar_rl.learner.engine import _loopback_store

LOCAL = ("127.0.0.1", "::ffff:127.0.0.1", "::1")


def listening() -> Iterator[tuple[str, str]]:
    """(process, address) of this process and its children."""
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield process.name(), connection.laddr.ip


def test_ray_listens_on_loopback_with_a_token_of_the_run(
    tmp_path: Path, without_ray_token: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch = without_ray_token
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", "/proc/no-home")  # where Ray would keep its token
    before = dict(os.environ)
    config = RunConfig.model_validate({"data": {"synthetic": {"n_train": 4}}})
    with Services(config, tmp_path) as services:
        assert LOOPBACK.items() <= services.worker_environment().items()
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o777 == 0o600

        @ray.remote(num_cpus=0)
        def address() -> str:
            return str(ray.util.get_node_ip_address())

        assert ray.get(address.remote()) == "127.0.0.1"  # where ranks meet
        found = list(listening())
        assert {"gcs_server", "raylet"} <= {name for name, _ in found}
        assert [row for row in found if row[1] not in LOCAL] == []
    assert not token.exists()
    assert os.environ["HOME"] == before["HOME"] and "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_the_store_of_local_ranks_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    store = _loopback_store(timedelta(seconds=20))
    store.set("key", "value")
    connections = psutil.Process().net_connections("inet")
    ours = [c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    assert [connection.laddr.ip for connection in ours] == ["127.0.0.1"]


def test_a_cluster_that_cannot_be_joined_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Could not reach the GCS\nline\nline")

    monkeypatch.setattr(ray, "init", refuse)
    config = RunConfig.model_validate(
        {"data": {"synthetic": {"n_train": 4}}, "resources": {"address": "head:6379"}}
    )
    with pytest.raises(ResourceError, match=r"head:6379 cannot be joined \(Could not reach"):
        Services(config, tmp_path).__enter__()
