"""The connection to Redis: thread-safe, typed errors, reconnects within a deadline."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.connection import parse_url
from redis.retry import Retry

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.errors import (
    BufferAccessError,
    BufferFullError,
    BufferSetupError,
    BufferUnreachableError,
    FencedError,
    LeaseHeldError,
    LedgerError,
    RecordError,
    StepTrainedError,
    UnknownRequestError,
    VersionError,
)
from avatar_rl.buffer_service.redis.scripting import script
from avatar_rl.buffer_service.redis.wire import Meanwhile, Reply, Wire, Word, pack
from avatar_rl.common.errors import ReplayBufferError

log = logging.getLogger(__name__)

T = TypeVar("T")
Take = Callable[[Sequence[str], list[bytes | None]], None]
MIN_VERSION = (6, 2)
_PART = 16  # values asked for at once: some are decoded while others come
_OURS = re.compile(r"AVATAR_([A-Z]+) (.*?)(?:,? script: [0-9a-f]{40}.*)?$", re.DOTALL)
_LUA = re.compile(r"Error running script|user_script:\d")
_KINDS: dict[str, tuple[type[ReplayBufferError], str]] = {
    "NORUN": (BufferSetupError, "was it removed? Resume from the last checkpoint"),
    "SETUP": (
        BufferSetupError,
        "use another run id, the same settings, or connect with reconfigure=True",
    ),
    "UNKNOWN": (UnknownRequestError, "push the request first, and send what its lease asked for"),
    "FENCED": (FencedError, "this learner was replaced; stop it"),
    "HELD": (LeaseHeldError, "wait for the lease to end, or take a new fencing token"),
    "TRAINED": (StepTrainedError, "continue with the next step"),
    "VERSION": (VersionError, "publish versions in ascending order"),
    "RECORD": (RecordError, "check what wrote it"),
    "TAKEN": (RecordError, "number the imported groups from another first seq"),
}
_AWAY = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.BusyLoadingError,
)
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.02, 1.0
#: What Redis says when it has no room: its memory, its disk, or a replica that it waits for.
_NO_ROOM = re.compile(r"OOM|'maxmemory'|MISCONF|NOREPLICAS")

#: Told of every refusal for want of room (text, False), and of the end of the pause (text, True).
#: Returns whether to wait on. One for the process: whoever talks to Redis pauses alike.
OnPause = Callable[[str, bool], bool]


def _wait_on(text: str, over: bool) -> bool:
    return True


on_pause: OnPause = _wait_on


@contextmanager
def pauses_told(told: OnPause) -> Iterator[None]:
    """In the block ``told`` hears when Redis takes no writes for want of room."""
    global on_pause
    before, on_pause = on_pause, told
    try:
        yield
    finally:
        on_pause = before


class _NearlyFull(redis.exceptions.RedisError):
    """We refuse ourselves, before Redis does."""


def _reason(error: redis.exceptions.RedisError) -> str:
    """ "away" or "full" where it may pass, else "refused"."""
    if isinstance(error, redis.exceptions.AuthenticationError):
        return "refused"  # a ConnectionError to redis-py; repeating it would not help
    if isinstance(error, _AWAY):
        return "away"
    text = str(error)
    full = isinstance(error, _NearlyFull) or (_NO_ROOM.search(text) and not _OURS.search(text))
    return "full" if full else "refused"


def _options(config: BufferConfig, url: str) -> dict[str, Any]:
    password = config.password()
    options: dict[str, Any] = {
        "username": config.username,
        "password": password.get_secret_value() if password else None,
        "socket_timeout": config.timeout_s,
        "socket_read_size": 1 << 18,  # a draw comes in a few reads
        "retry": Retry(NoBackoff(), 0),  # we retry ourselves, by deadline
    }
    if config.tls_ca:
        options["ssl_ca_certs"] = str(config.tls_ca)
    if not url.startswith("unix://"):
        options["socket_connect_timeout"] = config.timeout_s
    return {key: value for key, value in options.items() if value is not None}


def open_client(config: BufferConfig, url: str) -> redis.Redis:
    """A client for ``url`` with the credentials of ``config``; nothing is sent yet."""
    try:
        return redis.Redis.from_url(url, **_options(config, url))
    except ValueError as error:
        raise BufferSetupError(
            f"buffer.url: {error}; write redis://, rediss:// or unix://"
        ) from error


def open_wire(config: BufferConfig, url: str) -> Wire:
    """The short way to the same server; nothing is sent yet. Raises ValueError for a URL of another
    kind."""
    options = _options(config, url) | parse_url(url) | {"protocol": 2}
    return Wire(redis.ConnectionPool(**options))


def translate(error: redis.exceptions.RedisError, where: str) -> ReplayBufferError:
    """The typed error for what Redis answered."""
    text = str(error)
    if found := _OURS.search(text):
        kind, remedy = _KINDS[found.group(1)]
        return kind(f"{found.group(2).strip()}; {remedy}")
    if isinstance(
        error, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError
    ) or re.match(r"(WRONGPASS|NOAUTH|NOPERM|invalid username)", text):
        return BufferAccessError(
            f"{where} refuses this login ({text}); check username, password and ACL"
        )
    if isinstance(error, redis.exceptions.ReadOnlyError) or "READONLY" in text:
        return BufferAccessError(f"{where} is a read-only replica; give the URL of the primary")
    if isinstance(error, _NearlyFull):
        return BufferFullError(text)
    if "OOM" in text or "'maxmemory'" in text:
        return BufferFullError(
            f"{where} is out of memory, nothing was written; raise maxmemory or lower capacity"
        )
    if "MISCONF" in text or "NOREPLICAS" in text:
        return BufferFullError(
            f"{where} refuses writes ({text}); free its disk or repair its persistence"
        )
    if _LUA.search(text):
        return LedgerError(
            f"{where}: a script met keys that do not fit together ({text}): were keys of the run "
            "removed or edited from outside? Resume from the last checkpoint"
        )
    if isinstance(error, _AWAY):
        return BufferUnreachableError(f"{where} does not answer ({text}); is Redis running there?")
    return ReplayBufferError(f"{where}: {text}")


class Connection:
    """One run's namespace on one Redis. Every script is safe to repeat, so a call whose reply was
    lost is sent again."""

    def __init__(self, config: BufferConfig, run_id: str, url: str) -> None:
        self.config, self.run_id, self.url = config, run_id, url
        # The braces keep a run in one slot of a Redis cluster.
        self.prefix = f"avatar:{{{run_id}}}:"
        self.where = f"Redis at {re.sub('//[^@/]*@', '//', url)}"
        # The annotations of redis-py allow text replies, which we never ask for.
        self.client: Any = open_client(config, url)
        self._wire = open_wire(config, url)
        self._memory_checked = 0.0
        self.refusals = 0  # times that Redis had no room; grows while a call waits for it
        self._sorts = True  # until the server says that we may not

    def key(self, name: str) -> str:
        return self.prefix + name

    def attempt(self, operation: Callable[[], T]) -> T:
        """Runs ``operation``, and again while Redis is away or takes no writes.

        It is away for up to ``reconnect_s``. Without room (disk full, out of memory) nothing was
        written: it is asked again for up to ``pause_s``, and the process is told (``on_pause``).
        Raises typed errors."""
        try:
            return operation()
        except redis.exceptions.RedisError as error:
            return self._again(operation, error)

    def _again(self, operation: Callable[[], T], error: redis.exceptions.RedisError) -> T:
        """Repeats what failed with ``error`` until it succeeds or the time for its reason is up."""
        began = time.monotonic()
        deadlines: dict[str, float] = {}
        delay, paused = _FIRST_DELAY_S, False
        while True:
            reason = _reason(error)
            allowed = {"away": self.config.reconnect_s, "full": self.config.pause_s}.get(reason, 0)
            now = time.monotonic()
            deadline = deadlines.setdefault(reason, now + allowed)
            deadlines = {reason: deadline}  # an answer of another kind begins anew
            typed = translate(error, self.where)
            if reason == "full":
                self.refusals += 1
                if not paused:
                    log.warning("%s; it is asked again for %g s", typed, self.config.pause_s)
                paused = True
                if not on_pause(str(typed), False):
                    deadline = now
            if now >= deadline:
                raise typed from error
            time.sleep(min(delay, deadline - now) * random.uniform(0.8, 1.2))
            delay = min(2 * delay, _LONGEST_DELAY_S)
            try:
                result = operation()
            except redis.exceptions.RedisError as again:
                error = again
                continue
            if paused:
                waited = f"{self.where} takes writes again after {time.monotonic() - began:.1f} s"
                log.warning("%s", waited)
                on_pause(waited, True)
            return result

    def ask(self, *command: Word, meanwhile: Meanwhile = None) -> Reply:
        """The reply to one plain command. ``meanwhile`` runs while it is under way; it runs again
        if the reply was lost."""
        packed = pack(*command)
        return self.attempt(lambda: self._wire.ask(packed, meanwhile))

    def run(self, name: str, *args: Word) -> Reply:
        """One atomic operation by name."""
        packed = pack("EVALSHA", script(name).sha, 1, self.prefix, *args)

        def once() -> Reply:
            try:
                return self._wire.ask(packed)
            except redis.exceptions.NoScriptError:  # a restarted server has forgotten it
                return self._wire.ask(pack("EVAL", script(name).text, 1, self.prefix, *args))

        return self.attempt(once)

    def read_values(self, ids: Sequence[str], take: Take) -> None:
        """Hands the stored values of ``ids`` (None: gone) to ``take`` in parts, in order.

        One part is decoded while the next is under way. Raises what redis-py raises; call it by
        ``attempt``."""
        parts = [ids[i : i + _PART] for i in range(0, len(ids), _PART)]
        start = self.key("t:")
        commands = [pack("MGET", *[start + tid for tid in part]) for part in parts]
        rest = iter(parts)
        self._wire.each(commands, lambda values: take(next(rest), values))

    def draw_values(self, listed: str, count: int, take: Take, args: Sequence[Word]) -> bool:
        """A draw and its values in one round trip. ``take`` gets them as from ``read_values``.

        The draw ``args`` leaves at most ``count`` ids in the list ``listed``. False where this
        login may not SORT ... GET: nothing was taken. Raises what redis-py raises; call it by
        ``attempt``."""
        if not self._sorts:
            return False
        sort = ("SORT", self.key(listed), "BY", "nosort", "GET", self.key("t:*"), "LIMIT")
        commands = [pack("EVALSHA", script("draw").sha, 1, self.prefix, *args)]
        commands += [pack(*sort, first, _PART) for first in range(0, count, _PART)]
        ids: list[str] | None = None
        at = 0

        def reply(answer: Reply) -> None:
            nonlocal ids, at
            if ids is None:
                ids = answer.decode().split()
            elif ids:  # of an empty draw the list may be an old one
                take(ids[at : at + len(answer)], answer)
                at += len(answer)

        try:
            self._wire.each(commands, reply)
        except redis.exceptions.NoScriptError:
            self._wire.ask(pack("SCRIPT", "LOAD", script("draw").text))
            return self.draw_values(listed, count, take, args)
        except redis.exceptions.ResponseError as error:
            if ids is None or at:
                raise
            # Redis 7 wants a login that may read every key, a cluster never allows it, an ACL may
            # forbid SORT.
            log.info("%s: %s; a draw takes two round trips there", self.where, error)
            self._sorts = False
            return False
        if ids and at < len(ids):  # the server stood still for so long that the list had expired
            self.read_values(ids[at:], take)
        return True

    def together(self, build: Callable[[Pipeline], None]) -> list[Reply]:
        """The replies to plain commands that ``build`` queues, as one transaction."""

        def once() -> list[Reply]:
            with self.client.pipeline(transaction=True) as pipe:
                build(pipe)
                return list(pipe.execute())

        return self.attempt(once)

    def check_server(self) -> None:
        """Raises BufferSetupError or BufferAccessError when this Redis cannot hold the buffer."""
        info = self.attempt(lambda: self.client.info())
        version = tuple(int(x) for x in str(info["redis_version"]).split(".")[:2])
        if version < MIN_VERSION:
            raise BufferSetupError(
                f"{self.where} is version {info['redis_version']}; 6.2 or newer is needed"
            )
        if info.get("role") == "slave":
            raise BufferAccessError(
                f"{self.where} is a replica of {info.get('master_host')}; give the primary's URL"
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise BufferSetupError(
                f"{self.where} has maxmemory-policy {policy}, it must be noeviction, else it "
                "loses data"
            )

    def check_memory(self) -> None:
        """Waits for room above ``memory_limit`` of maxmemory; looks at most once a second.

        Raises BufferFullError when there is none within ``pause_s``."""
        if time.monotonic() - self._memory_checked < 1.0:
            return

        def look() -> None:
            info = self.client.info("memory")
            limit, used = int(info["maxmemory"]), int(info["used_memory"])
            if limit and used > self.config.memory_limit * limit:
                raise _NearlyFull(
                    f"{self.where} uses {used >> 20} of {limit >> 20} MiB, above "
                    f"buffer.memory_limit {self.config.memory_limit}; raise maxmemory or lower "
                    "buffer.capacity"
                )

        self.attempt(look)
        self._memory_checked = time.monotonic()

    def close(self) -> None:
        self._wire.close()
        self.client.close()
