"""Config section of an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import ipaddress
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from avatar_rl.common.config import Section


def is_loopback(host: str | None) -> bool:
    """Whether a host of a URL is this machine alone."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint, and how long to wait for it."""

    base_url: str = Field(default="", description="Endpoint, e.g. http://judge:8000/v1; required.")
    model: str = Field(
        default="", description="Model name the endpoint serves, e.g. InternVL3-2B; required."
    )
    api_key_env: str | None = Field(
        default=None, description="Environment variable with the API key; unset: no key is sent."
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="Sampling temperature; 0 makes cached and fresh replies agree.",
    )
    max_tokens: int = Field(
        default=256, ge=16, description="Longest reply in tokens; four scores need about 60."
    )
    reply_format: Literal["json_object", "none"] = Field(
        default="none",
        description="'json_object' asks the endpoint to constrain the reply to JSON, where it can.",
    )
    concurrency: int = Field(
        default=64, ge=1, description="Requests in flight per process that asks."
    )
    request_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds for one request, its whole reply included."
    )
    deadline_s: float = Field(
        default=120.0, gt=0, description="Seconds for one completion, retries and waits included."
    )
    attempts: int = Field(default=4, ge=1, description="Requests per completion at most.")
    backoff_s: float = Field(
        default=0.5,
        gt=0,
        description="Wait before the second request; doubles each time, with jitter.",
    )
    breaker_failures: int = Field(
        default=8, ge=1, description="Failed requests in a row that open the circuit breaker."
    )
    breaker_cooldown_s: float = Field(
        default=30.0, gt=0, description="Seconds without requests before one trial request."
    )
    cache_size: int = Field(
        default=50_000,
        ge=0,
        description="Replies kept in memory by content, oldest use dropped; 0: none.",
    )

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        """A client would take what is none, and fail on its first request."""
        if not url:
            return url
        try:
            parts = urlsplit(url)
            named, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"is no URL ({error}): write http://HOST:PORT/v1") from error
        if parts.scheme not in ("http", "https") or not named or port == 0:
            raise ValueError("is no URL of an endpoint: write http://HOST:PORT/v1")
        if any(letter.isspace() or not letter.isprintable() for letter in url):
            raise ValueError("holds a blank or a letter that is not seen: write it without")
        if parts.username is not None:
            raise ValueError("holds a user or password: name a variable in api_key_env instead")
        return url

    @property
    def on_loopback(self) -> bool:
        """Whether it is on this machine, where no proxy of the environment finds it."""
        return is_loopback(urlsplit(self.base_url).hostname)
