"""A judge behind an OpenAI-compatible endpoint: bounded, cached, and never a silent zero (METHOD 1.5)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from prompts.errors import ConfigError, ResourceError
from prompts.record import Prompt
from rewards.breaker import CircuitBreaker
from rewards.config import JudgeConfig
from rewards.judge import ContentPart, Verdict
from rewards.judge_prompt import build_messages, parse_reply

log = logging.getLogger(__name__)

_RETRIED_STATUS = {408, 409, 425, 429}


class _Failed(Exception):
    """One request came to nothing: why, whether another may help, and how long the endpoint asked us to wait."""

    def __init__(self, kind: str, what: str, *, retry: bool, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


class OpenAIJudge:
    """Asks the endpoint once per distinct completion; equal questions in flight share one request.

    A completion that cannot be scored within its attempts and deadline gets None, and is counted (``stats``).
    Raises ConfigError for a missing URL, model or key. Belongs to one event loop.
    """

    def __init__(self, config: JudgeConfig) -> None:
        for field in ("base_url", "model"):
            if not getattr(config, field):
                raise ConfigError(f"rewards.judge.{field} is empty: name the endpoint, or set rewards.judge.kind: rule")
        self._config = config
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=_api_key(config),
            max_retries=0,  # retries are ours: they share one deadline and are counted
            timeout=config.request_timeout_s,
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._breaker = CircuitBreaker(config.breaker_failures, config.breaker_cooldown_s)
        self._cache: OrderedDict[str, Verdict] = OrderedDict()
        self._in_flight: dict[str, asyncio.Task[Verdict | None]] = {}
        self._counts: Counter[str] = Counter()
        self._jitter = random.Random()

    async def verdict(self, prompt: Prompt, think: str, answer: str, media: Sequence[ContentPart]) -> Verdict | None:
        """The four scores, from the cache where the same material was judged before; None if they could not be had."""
        messages = self._messages(prompt, think, answer, media, remind=False)
        key = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            self._counts["cache_hits"] += 1
            return dict(cached)
        task = self._in_flight.get(key)
        if task is None:
            reminded = self._messages(prompt, think, answer, media, remind=True)
            task = asyncio.create_task(self._judge(prompt.id, messages, reminded))
            self._in_flight[key] = task
            task.add_done_callback(lambda _: self._in_flight.pop(key, None))
        else:
            self._counts["cache_hits"] += 1
        result = await asyncio.shield(task)  # one waiter's cancellation must not take the verdict from the others
        if result is not None and self._config.cache_size:
            self._cache[key] = result
            while len(self._cache) > self._config.cache_size:
                self._cache.popitem(last=False)
        return None if result is None else dict(result)

    async def check(self) -> None:
        """Raises ResourceError if the endpoint is silent, ConfigError if it refuses the key or lacks the model."""
        config = self._config
        try:
            served = [model.id async for model in await self._models()]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigError(
                f"judge at {config.base_url} refused the key (HTTP {error.status_code}); "
                f"put a valid one into the variable that rewards.judge.api_key_env names ({config.api_key_env})"
            ) from error
        except openai.NotFoundError:
            log.info("judge at %s does not list its models; its model name is not checked", config.base_url)
            return
        except (openai.APIError, ValueError, TimeoutError) as error:
            raise ResourceError(
                f"judge at {config.base_url} does not answer ({type(error).__name__}: {error}); "
                "start it, or correct rewards.judge.base_url"
            ) from error
        if config.model not in served:
            raise ConfigError(f"judge at {config.base_url} has no model {config.model!r}; it serves {served}")

    async def close(self) -> None:
        """Cancel what is in flight and close the connections."""
        for task in list(self._in_flight.values()):
            task.cancel()
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        await self._client.close()

    def stats(self) -> dict[str, float]:
        """Requests, replies, cache_hits, unscored, and every kind of failure by name."""
        return {**self._counts, "breaker_open": float(self._breaker.is_open), "cached": float(len(self._cache))}

    def _messages(
        self, prompt: Prompt, think: str, answer: str, media: Sequence[ContentPart], *, remind: bool
    ) -> list[dict[str, Any]]:
        return build_messages(prompt, think, answer, media, max_chars=self._config.max_chars, remind=remind)

    async def _models(self) -> Any:
        return await asyncio.wait_for(self._client.models.list(), self._config.request_timeout_s)

    async def _judge(
        self, prompt_id: str, messages: list[dict[str, Any]], reminded: list[dict[str, Any]]
    ) -> Verdict | None:
        """Ask until there is a verdict, or attempts, deadline or circuit breaker end it."""
        async with self._slots:  # held through the waits too: a struggling endpoint gets fewer requests
            deadline = time.monotonic() + self._config.deadline_s
            ask, failure = messages, _Failed("breaker_skips", "circuit breaker is open", retry=False)
            for attempt in range(self._config.attempts):
                if not self._breaker.allow():
                    self._counts["breaker_skips"] += 1
                    break
                try:
                    return await self._request(ask, min(self._config.request_timeout_s, deadline - time.monotonic()))
                except _Failed as error:
                    failure = error
                self._counts[failure.kind] += 1
                wait = max(failure.wait_s, self._config.backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.0))
                if not failure.retry or attempt + 1 == self._config.attempts:
                    break
                if time.monotonic() + wait >= deadline:
                    self._counts["deadline"] += 1
                    break
                if failure.kind == "invalid_reply":
                    ask = reminded
                self._counts["retries"] += 1
                await asyncio.sleep(wait)
        if not self._counts["unscored"]:
            log.warning("judge: prompt %s not scored (%s); masked, further cases are only counted", prompt_id, failure)
        self._counts["unscored"] += 1
        return None

    async def _request(self, messages: list[dict[str, Any]], timeout_s: float) -> Verdict:
        """One request. Raises _Failed; tells the breaker how the endpoint (not its reply's content) behaved."""
        self._counts["requests"] += 1
        try:
            reply = await asyncio.wait_for(self._post(messages), timeout_s)
        except _Failed as failure:
            if failure.kind != "http_429":  # asked to slow down: alive
                self._breaker.failure()
            raise
        except TimeoutError as error:
            self._breaker.failure()
            raise _Failed("timeout", f"no reply within {timeout_s:.1f} s", retry=True) from error
        self._breaker.success()
        self._counts["replies"] += 1
        try:
            verdict, missing = parse_reply(reply)
        except ValueError as error:
            raise _Failed("invalid_reply", f"unusable reply: {error}", retry=True) from error
        self._counts["missing_keys"] += missing
        return verdict

    async def _post(self, messages: list[dict[str, Any]]) -> str:
        config = self._config
        options: dict[str, Any] = {}
        if config.reply_format == "json_object":
            options["response_format"] = {"type": "json_object"}
        try:
            reply: Any = await self._client.chat.completions.create(
                model=config.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                **options,
            )
            return str(reply.choices[0].message.content or "")
        except openai.APITimeoutError as error:
            raise TimeoutError(str(error)) from error
        except openai.APIStatusError as error:
            status = error.status_code
            retry = status >= 500 or status in _RETRIED_STATUS
            kind = f"http_{status}"
            raise _Failed(kind, f"HTTP {status}", retry=retry, wait_s=_retry_after(error)) from error
        except openai.APIConnectionError as error:
            raise _Failed("connection", f"connection failed: {error.__cause__ or error}", retry=True) from error
        except (openai.APIError, ValueError, LookupError, AttributeError, TypeError) as error:
            # A 200 whose body is not a chat completion: half a document, no choices, another protocol.
            raise _Failed("bad_body", f"not a chat completion ({type(error).__name__}: {error})", retry=True) from error


def _api_key(config: JudgeConfig) -> str:
    if config.api_key_env is None:
        return "none"
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(f"rewards.judge.api_key_env names {config.api_key_env}, which is not set in the environment")
    return key


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds of a Retry-After header, given as a number or an HTTP date; 0 without a readable one."""
    value = error.response.headers.get("retry-after", "").strip()
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
