"""Questions to an OpenAI-compatible endpoint: bounded, cached, retried within a deadline, and every
failure counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import openai

from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.common.types import ReadOnlyObject

if TYPE_CHECKING:
    from openai.pagination import AsyncPage
    from openai.types import Model
    from openai.types.chat import ChatCompletion

log = logging.getLogger(__name__)

#: Chat messages as the API takes them.
Messages: TypeAlias = Sequence[ReadOnlyObject]
Reply = TypeVar("Reply")

_RETRIED_STATUS = {408, 409, 425, 429}


class _Failed(Exception):
    """One request came to nothing: why, whether another may help, and how long the endpoint asked
    us to wait."""

    def __init__(self, kind: str, what: str, *, retry: bool, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


class CircuitBreaker:
    """Closed until ``failures`` requests fail in a row, then one trial per ``cooldown_s`` until it
    succeeds."""

    def __init__(
        self, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._in_a_row = 0
        self._next_trial = 0.0

    @property
    def is_open(self) -> bool:
        return self._in_a_row >= self._limit

    def allow(self) -> bool:
        """Whether a request may be sent now; True on an open breaker uses up the trial of this
        cooldown."""
        if not self.is_open:
            return True
        if self._clock() < self._next_trial:
            return False
        self._next_trial = self._clock() + self._cooldown_s
        return True

    def success(self) -> None:
        self._in_a_row = 0

    def failure(self) -> None:
        self._in_a_row += 1
        self._next_trial = self._clock() + self._cooldown_s


@dataclass(frozen=True)
class NoReply:
    """A question whose reply could not be had."""

    unusable: bool  # the endpoint replied to every attempt, and no reply could be read


class ChatClient:
    """Asks each distinct question once; equal questions in flight share one request. Belongs to one
    event loop.

    What cannot be had within its attempts and deadline is a ``NoReply``, and counted (``stats``).
    ``role`` ("judge") and ``named`` ("base_url" -> "rewards.judge.base_url") are for messages.
    Raises ConfigError for a missing URL, model or key."""

    def __init__(self, config: EndpointConfig, *, role: str, named: Callable[[str], str]) -> None:
        for field in ("base_url", "model"):
            if not getattr(config, field):
                raise ConfigError(f"{named(field)} is empty: name the {role}'s endpoint and model")
        self.counts: Counter[str] = Counter()
        self._config, self._role, self._named = config, role, named
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=_api_key(config, named),
            max_retries=0,  # retries are ours: they share one deadline and are counted
            timeout=config.request_timeout_s,
            # no proxy of the environment finds our loopback
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not config.on_loopback),
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._breaker = CircuitBreaker(config.breaker_failures, config.breaker_cooldown_s)
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._in_flight: dict[str, asyncio.Task[Any]] = {}
        self._jitter = random.Random()

    async def ask(
        self, name: str, messages: Messages, reminded: Messages, parse: Callable[[str], Reply]
    ) -> Reply | NoReply:
        """The parsed reply, from the cache where the same was asked before, or why there is none.

        ``parse`` raises ValueError for an unusable reply, after which ``reminded`` is sent.
        ``name`` is for the log."""
        key = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
        if key in self._cache:
            self._cache.move_to_end(key)
            self.counts["cache_hits"] += 1
            return self._cache[key]  # type: ignore[no-any-return]
        task = self._in_flight.get(key)
        if task is None:
            task = asyncio.create_task(self._insist(name, messages, reminded, parse))
            self._in_flight[key] = task
            task.add_done_callback(lambda _: self._in_flight.pop(key, None))
        else:
            self.counts["cache_hits"] += 1
        result = await asyncio.shield(
            task
        )  # one waiter's cancellation must not take the reply from the others
        if not isinstance(result, NoReply) and self._config.cache_size:
            self._cache[key] = result
            while len(self._cache) > self._config.cache_size:
                self._cache.popitem(last=False)
        return result  # type: ignore[no-any-return]

    async def takes(self, messages: Messages) -> bool:
        """Whether the endpoint accepts such a message: a kind of content that it does not know is
        refused. One that gives no reply within its attempts does not take it."""
        for attempt in range(self._config.attempts):
            self.counts["requests"] += 1
            try:
                await asyncio.wait_for(self._post(messages), self._config.request_timeout_s)
                return True
            except TimeoutError:
                continue
            except _Failed as error:
                if not error.retry:
                    return False
                await asyncio.sleep(max(error.wait_s, self._config.backoff_s * 2**attempt))
        return False

    async def check(self) -> None:
        """Raises ResourceError if the endpoint is silent, ConfigError if it refuses the key or
        lacks the model."""
        config, role = self._config, self._role
        try:
            served = [model.id async for model in await self._models()]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigError(
                f"{role} at {config.base_url} refused the key (HTTP {error.status_code}); "
                f"put a valid one into the variable that {self._named('api_key_env')} names "
                f"({config.api_key_env})"
            ) from error
        except openai.NotFoundError:
            log.info(
                "%s at %s does not list its models; its model name is not checked",
                role,
                config.base_url,
            )
            return
        except (openai.APIError, ValueError, TimeoutError) as error:
            raise ResourceError(
                f"{role} at {config.base_url} does not answer ({type(error).__name__}: {error}); "
                f"start it, or correct {self._named('base_url')}"
            ) from error
        if config.model not in served:
            raise ConfigError(
                f"{role} at {config.base_url} has no model {config.model!r}; it serves {served}"
            )

    async def close(self) -> None:
        """Cancel what is in flight and close the connections."""
        for task in list(self._in_flight.values()):
            task.cancel()
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        await self._client.close()

    def stats(self) -> dict[str, float]:
        """Requests, replies, tokens, cache_hits, unscored, and every kind of failure by name."""
        return {
            **self.counts,
            "breaker_open": float(self._breaker.is_open),
            "cached": float(len(self._cache)),
        }

    async def _models(self) -> AsyncPage[Model]:
        return await asyncio.wait_for(self._client.models.list(), self._config.request_timeout_s)

    async def _insist(
        self, name: str, messages: Messages, reminded: Messages, parse: Callable[[str], Reply]
    ) -> Reply | NoReply:
        """Ask until there is a usable reply, or attempts, deadline or circuit breaker end it."""
        async with (
            self._slots
        ):  # held through the waits too: a struggling endpoint gets fewer requests
            deadline = time.monotonic() + self._config.deadline_s
            question, failure = (
                messages,
                _Failed("breaker_skips", "circuit breaker is open", retry=False),
            )
            unusable = True
            for attempt in range(self._config.attempts):
                if not self._breaker.allow():
                    self.counts["breaker_skips"] += 1
                    unusable = False
                    break
                try:
                    limit = min(self._config.request_timeout_s, deadline - time.monotonic())
                    return await self._request(question, parse, limit)
                except _Failed as error:
                    failure = error
                self.counts[failure.kind] += 1
                unusable = unusable and failure.kind == "invalid_reply"
                wait = max(
                    failure.wait_s,
                    self._config.backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.0),
                )
                if not failure.retry or attempt + 1 == self._config.attempts:
                    break
                if time.monotonic() + wait >= deadline:
                    self.counts["deadline"] += 1
                    break
                if failure.kind == "invalid_reply":
                    question = reminded
                self.counts["retries"] += 1
                await asyncio.sleep(wait)
        if not self.counts["unscored"]:
            log.warning(
                "%s: prompt %s got no reply (%s); further cases are only counted",
                self._role,
                name,
                failure,
            )
        self.counts["unscored"] += 1
        return NoReply(unusable)

    async def _request(
        self, messages: Messages, parse: Callable[[str], Reply], timeout_s: float
    ) -> Reply:
        """One request. Raises _Failed; tells the breaker how the endpoint (not its reply's content)
        behaved."""
        self.counts["requests"] += 1
        try:
            text = await asyncio.wait_for(self._post(messages), timeout_s)
        except _Failed as failure:
            if failure.kind != "http_429":  # asked to slow down: alive
                self._breaker.failure()
            raise
        except TimeoutError as error:
            self._breaker.failure()
            raise _Failed("timeout", f"no reply within {timeout_s:.1f} s", retry=True) from error
        self._breaker.success()
        self.counts["replies"] += 1
        try:
            return parse(text)
        except ValueError as error:
            raise _Failed("invalid_reply", f"unusable reply: {error}", retry=True) from error

    async def _post(self, messages: Messages) -> str:
        config = self._config
        try:
            reply: ChatCompletion = await self._client.chat.completions.create(
                model=config.model,
                messages=messages,  # type: ignore[arg-type]  # checked by the endpoint
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                response_format=(
                    {"type": "json_object"} if config.reply_format == "json_object" else openai.omit
                ),
            )
            text = str(reply.choices[0].message.content or "")
        except openai.APITimeoutError as error:
            raise TimeoutError(str(error)) from error
        except openai.APIStatusError as error:
            status = error.status_code
            retry = status >= 500 or status in _RETRIED_STATUS
            kind = f"http_{status}"
            raise _Failed(
                kind, f"HTTP {status}", retry=retry, wait_s=_retry_after(error)
            ) from error
        except openai.APIConnectionError as error:
            raise _Failed(
                "connection", f"connection failed: {error.__cause__ or error}", retry=True
            ) from error
        except (openai.APIError, ValueError, LookupError, AttributeError, TypeError) as error:
            # A 200 whose body is not a chat completion: half a document, no choices, another
            # protocol.
            raise _Failed(
                "bad_body", f"not a chat completion ({type(error).__name__}: {error})", retry=True
            ) from error
        for kind in ("prompt_tokens", "completion_tokens"):
            used = getattr(getattr(reply, "usage", None), kind, None)
            self.counts[kind] += used if isinstance(used, int) else 0
        return text


def _api_key(config: EndpointConfig, named: Callable[[str], str]) -> str:
    if config.api_key_env is None:
        return "none"
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"{named('api_key_env')} names {config.api_key_env}, which is not set in the "
            "environment"
        )
    return key


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds of a Retry-After header, given as a number or an HTTP date; 0 without a readable
    one."""
    value = error.response.headers.get("retry-after", "").strip()
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
