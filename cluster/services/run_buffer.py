"""A run's replay buffer, opened from outside the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import yaml

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.telemetry.run_files import ENDED, MASK, read_status
from avatar_rl.common.errors import ConfigError, ReplayBufferError

log = logging.getLogger(__name__)

RECONNECT_S = 2.0  # for a server that is named by hand: it is there or it is not


@contextmanager
def open_buffer(
    run: str,
    *,
    url: str | None,
    password_env: str | None = None,
    create: bool = False,
    under_way: bool = False,
    login: BufferConfig | None = None,
) -> Iterator[ReplayBuffer]:
    """The buffer of ``run``: a run id at ``url``, or a run folder.

    A run folder's buffer is at the server that its recipe names, or embedded; an embedded one is
    started from its append-only file.

    Args:
        run: A run id where ``url`` is given, else a run folder.
        url: The server.
        password_env: Variable that holds the password for ``url``.
        create: Set up a new run at ``url`` where there is none.
        under_way: The run works now: use the server it has.
        login: Secrets for the server that the recipe names.

    Raises:
        ConfigError: not a run folder, one that hides a password, or one whose run works now.
        BufferSetupError: the embedded server is in use; and as ``ReplayBuffer.attach`` does.
    """
    if url is not None:
        with ReplayBuffer.attach(
            BufferConfig(password_env=password_env, reconnect_s=RECONNECT_S),
            run,
            url,
            create=create,
        ) as buffer:
            yield buffer
        return
    folder = Path(run)
    recipe, data = folder / "config.yaml", folder / "redis"
    if not recipe.is_file():
        raise ConfigError(f"{folder} is not a run folder: give one of `avatar runs`, or --url")
    config = BufferConfig.recorded(yaml.safe_load(recipe.read_text())["buffer"])
    if config.url is not None:
        with (
            nullcontext() if under_way else _held(folder),
            _served(folder, config.url, login or config) as buffer,
        ):
            yield buffer
        return
    if not data.is_dir():
        raise ConfigError(
            f"{folder} has no embedded buffer: its run ended before it had one, or name its --url"
        )
    if under_way and (server_url := running_server(folder)) is not None:
        with ReplayBuffer.attach(config, folder.resolve().name, server_url) as buffer:
            yield buffer
        return
    with (
        EmbeddedRedis(data, appendfsync=config.appendfsync) as server,
        ReplayBuffer.connect(config, folder.resolve().name, url=server.url) as buffer,
    ):
        yield buffer


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The run's lock, so that no job resumes it meanwhile."""
    lock = RunLock(folder, on_warning=print)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _served(folder: Path, url: str, login: BufferConfig) -> ReplayBuffer:
    """Where ``login`` leads, to a server that may have moved, or else at the URL that the run
    had."""
    if MASK in url and login.url in (None, url):
        raise ConfigError(
            f"{folder / 'config.yaml'} has the password in buffer.url masked: give --url"
        )
    run_id = folder.resolve().name
    if login.url in (None, url):
        return ReplayBuffer.attach(login, run_id, url)
    try:
        return ReplayBuffer.attach(login, run_id, login.url)
    except ReplayBufferError as error:
        if MASK in url:
            raise
        log.info(
            "the buffer of run %s is not at buffer.url (%s): its own URL is tried", run_id, error
        )
        return ReplayBuffer.attach(login, run_id, url)


def running_server(folder: Path) -> str | None:
    """URL of the embedded server of a run that is under way on this machine, as it wrote it into
    the lock of its data folder; None when there is none."""
    lock = folder / "redis" / "lock"
    if not (folder / "status.json").is_file() or not lock.is_file():
        return None
    status = read_status(folder)
    return None if status.lost or status.state in ENDED else lock.read_text().strip() or None
