"""Who may see the page: whoever has the token, by a name of this machine."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
ASK = "open the address that `avatar view` printed; it holds the token"
HEADERS = {
    # Nothing from elsewhere, no inline script: a text that became markup could still do nothing.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; media-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}


def names_of(host: str) -> frozenset[str]:
    """Names by which a server that listens on ``host`` may be asked.

    A page of another site that resolves its own name to this machine is refused by this (DNS
    rebinding)."""
    names = {*LOOPBACK_NAMES, host.strip("[]").lower()}
    if host in ("0.0.0.0", "::", ""):
        import psutil

        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        names |= {
            address.address.partition("%")[0].lower()
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
        }
    return frozenset(names)


class Guard:
    """ASGI middleware: checks the Host header, then the token in the address or the cookie."""

    def __init__(self, app: ASGIApp, *, token: str, names: Iterable[str], cookie: str) -> None:
        self.app, self.token, self.cookie = app, token, cookie
        self.names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
            return
        await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """What is answered in place of the page; None where it may be shown."""
        headers = Headers(scope=scope)
        if host_name(headers.get("host", "")) not in self.names:
            return PlainTextResponse(
                "This server is not known by that name; use the address it printed.\n", 421
            )
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("Only GET.\n", 405)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.pop("token", [])
        if given:
            if not self._is_token(given[-1]):
                return PlainTextResponse(f"The token is wrong: {ASK}.\n", 403)
            rest = urlencode(query, doseq=True)
            # A path that begins with // would lead to another host.
            path = "/" + scope["path"].lstrip("/")
            response = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return response
        if not self._is_token(self._cookie_of(headers)):
            return PlainTextResponse(f"The token is missing: {ASK}.\n", 401)
        return None

    def _is_token(self, given: str) -> bool:
        """In constant time."""
        return secrets.compare_digest(given.encode(), self.token.encode())

    def _cookie_of(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found is not None else ""


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return wrapped
