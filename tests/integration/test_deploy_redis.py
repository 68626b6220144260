"""The shipped Redis configuration and its users, on a real server."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.redis.server import find_redis_server
from avatar_rl.buffer_service.store import ReplayBuffer

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_redis_with_our_configuration_and_users_serves_the_buffer(tmp_path: Path) -> None:
    """TLS and paths apart, which need certificates, it is the shipped configuration."""
    digest = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("AVATAR", "VIEWER")}
    users = (DEPLOY / "redis" / "users.acl.template").read_text()
    for name, value in digest.items():
        users = users.replace(f"@{name}_SHA256@", value)
    rules = [line for line in users.splitlines() if line.startswith("user")]
    (tmp_path / "users.acl").write_text("\n".join(rules) + "\n")
    socket = tmp_path / "redis.sock"
    replaced = ("tls-", "aclfile", "dir ", "bind ")
    shipped = (DEPLOY / "redis" / "redis.conf").read_text().splitlines()
    lines = [line for line in shipped if not line.startswith(replaced)]
    lines += [f"aclfile {tmp_path}/users.acl", f"dir {tmp_path}", f"unixsocket {socket}"]
    (tmp_path / "redis.conf").write_text("\n".join(lines) + "\n")
    server = subprocess.Popen(
        [find_redis_server(), str(tmp_path / "redis.conf")], stdout=subprocess.DEVNULL
    )
    try:
        (tmp_path / "password").write_text("AVATAR")
        config = BufferConfig(
            username="avatar", password_file=tmp_path / "password", reconnect_s=10
        )
        with ReplayBuffer.connect(config, "acl", f"unix://{socket}") as buffer:
            buffer.requests.push([RolloutRequest(seq=0, prompt_id="a", step=0, n=1)])
            [lease] = buffer.requests.lease("me", 1)
            assert buffer.requests.release([lease]) == 1
            buffer.control.heartbeat("rollout", "me", 1)
            assert buffer.control.heartbeats().keys() == {"rollout/me"}
            buffer.control.set_desired("rollout_workers", 3)
            assert buffer.control.desired("rollout_workers") == 3
            buffer.snapshot(tmp_path / "snapshot")
            assert (
                buffer.stats.read().pending_train == 1
                and buffer.stats.check_ledger().generated == 0
            )
            with pytest.raises(redis.exceptions.NoPermissionError):
                buffer._connection.client.execute_command("CONFIG", "GET", "dir")
            with pytest.raises(redis.exceptions.NoPermissionError):
                buffer._connection.client.set("other:key", "1")
            viewer = redis.Redis(unix_socket_path=str(socket), username="viewer", password="VIEWER")
            assert viewer.hget("avatar:{acl}:desired", "rollout_workers") == b"3"
            with pytest.raises(redis.exceptions.NoPermissionError):
                viewer.hset("avatar:{acl}:desired", "rollout_workers", 9)
            assert buffer.clear() > 0
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis(unix_socket_path=str(socket)).ping()
    finally:
        server.terminate()
        server.wait(10)
