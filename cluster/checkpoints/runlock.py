"""One job per run: a lock in the run's folder for jobs that share its disk, and one in Redis for
jobs that share that.

No clock is compared between hosts. A holder on this host is alive while its process is. A holder
elsewhere is alive while its heartbeat counter changes as we look. In Redis the key lasts while its
holder renews it, by Redis' own clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import psutil
import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.connection import open_client, translate
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.files import replace_text

log = logging.getLogger(__name__)

BEAT_S = 2.0
SILENCE_S = 4 * BEAT_S  # a counter that stands still for this long belongs to nobody
LOCK = "run.lock"


class Holder(TypedDict, total=False):
    """Content of a lock; empty where it cannot be read."""

    host: str
    pid: int
    started: float  # of the process, seconds since the epoch
    token: str
    beats: int  # grows while the holder lives


class RunLock:
    """Held from ``acquire`` to ``release``; ``lost`` says who took it, should somebody."""

    def __init__(
        self, folder: Path, *, on_warning: Callable[[str], None], beat_s: float = BEAT_S
    ) -> None:
        self.path = folder / LOCK
        self.run_id = folder.name
        self.host = socket.gethostname()
        self.token = secrets.token_hex(8)
        self.lost: str | None = None
        self._on_warning, self._beat_s = on_warning, beat_s
        self._beats = 0
        self._redis: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def _key(self) -> str:
        # not among the run's own keys, which a restore replaces
        return f"avatar:lock:{{{self.run_id}}}"

    def acquire(self) -> None:
        """Take the folder's lock, breaking one whose holder is gone. Raises ConfigError naming a
        holder that lives."""
        with self._one_at_a_time():
            while True:
                try:
                    descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                except FileExistsError:
                    self._break_stale()
                    continue
                with os.fdopen(descriptor, "w") as file:
                    file.write(self._text())
                break
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def acquire_redis(self, config: BufferConfig, url: str) -> None:
        """Take the lock in Redis too. Raises ConfigError when somebody renews it, or as a
        connection does."""
        client: Any = open_client(config, url)
        ttl = int(SILENCE_S * 1000)
        deadline = time.monotonic() + SILENCE_S + self._beat_s
        try:
            while not client.set(self._key, self._holder(), nx=True, px=ttl):
                if time.monotonic() > deadline:
                    holder = (client.get(self._key) or b"?").decode()
                    raise ConfigError(
                        f"run {self.run_id} is held by {holder} (lock in Redis): stop that job, or "
                        "give this one another name"
                    )
                time.sleep(self._beat_s / 4)
        except redis.exceptions.RedisError as error:
            raise translate(error, "Redis") from error
        self._redis = client

    def release(self) -> None:
        """Let go of both; harmless when nothing is held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._mine():
                self.path.unlink(missing_ok=True)
        if self._redis is not None:
            try:
                if (self._redis.get(self._key) or b"").decode() == self._holder():
                    self._redis.delete(self._key)
            except redis.exceptions.RedisError:
                log.info("the lock of run %s in Redis is left to expire", self.run_id)
            self._redis.close()
            self._redis = None

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Contenders on this host queue: one must not break the lock that another has just
        taken."""
        with self.path.with_name(f".{LOCK}.queue").open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            yield

    # -- the parts ---------------------------------------------------------------------------------

    def _holder(self) -> str:
        return f"process {os.getpid()} on {socket.gethostname()} ({self.token})"

    def _text(self) -> str:
        started = psutil.Process().create_time()
        holder = Holder(
            host=self.host,
            pid=os.getpid(),
            started=started,
            token=self.token,
            beats=self._beats,
        )
        return json.dumps(holder)

    def _mine(self) -> bool:
        return _read(self.path).get("token") == self.token

    def _keep(self) -> None:
        while not self._stop.wait(self._beat_s):
            self._beats += 1
            try:
                found = _parsed(self.path)
                if found.get("token") != self.token:
                    self.lost = (
                        f"process {found.get('pid')} on {found.get('host')}" if found else "nobody"
                    )
                    return
                replace_text(self.path, self._text())
            except OSError as error:
                # A full disk, perhaps: the run continues.
                log.info("heartbeat of run %s not written: %s", self.run_id, error)
            self._renew()

    def _renew(self) -> None:
        if self._redis is None:
            return
        try:
            self._redis.set(self._key, self._holder(), px=int(SILENCE_S * 1000))
        except redis.exceptions.RedisError as error:
            log.info("lock of run %s in Redis not renewed: %s", self.run_id, error)

    def _break_stale(self) -> None:
        """Returns once the lock is out of the way. Raises ConfigError when its holder lives."""
        holder = _read(self.path)
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if holder and holder.get("host") == socket.gethostname():
            alive = _lives(int(holder["pid"]), float(holder["started"]))
        else:
            alive = self._moves(holder.get("beats"))
        if alive:
            raise ConfigError(
                f"run {self.run_id} is under way as {who}: stop it, or start a run of its own"
            )
        self._on_warning(
            f"the lock of run {self.run_id} was left behind by {who}, which is gone; it is broken"
        )
        grave = self.path.with_name(f".{LOCK}.{self.token}")
        try:
            self.path.rename(grave)  # one of several contenders succeeds
            grave.unlink()
        except FileNotFoundError:
            return

    def _moves(self, beats: int | None) -> bool:
        """Whether a foreign heartbeat changes while we look, by our own clock."""
        deadline = time.monotonic() + SILENCE_S / BEAT_S * self._beat_s
        while time.monotonic() < deadline:
            time.sleep(self._beat_s / 4)
            now = _read(self.path)
            if now and now.get("beats") != beats:
                return True
        return False


def _read(path: Path) -> Holder:
    """The lock's content; empty when it is gone, half-written or cannot be read."""
    try:
        return _parsed(path)
    except OSError:
        return {}


def _parsed(path: Path) -> Holder:
    """The lock's content; empty when it is gone or half-written. Raises OSError when storage fails
    to say."""
    try:
        found: Holder = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
