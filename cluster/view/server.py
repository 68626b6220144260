"""The page's server: static files, resources as JSON, and media with byte ranges."""

from __future__ import annotations

import gzip
import hashlib
import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import msgspec
import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from avatar_rl.cluster.view.guard import LOOPBACK_NAMES, Guard, names_of
from avatar_rl.cluster.view.media import TYPES, Clip
from avatar_rl.cluster.view.resources import NoSuchResourceError, Resources
from avatar_rl.common.errors import AvatarError, ConfigError, ResourceError
from avatar_rl.common.types import Json

STATIC = Path(__file__).parent / "static"
TOKEN_ENV = "AVATAR_VIEW_TOKEN"
SHORTEST_TOKEN = 16
LEAST_ZIPPED = 4096  # bytes


def application(resources: Resources, *, token: str, host: str, cookie: str) -> Starlette:
    """The ASGI application, guarded."""
    pages = Pages(resources)
    return Starlette(
        routes=[
            Route("/", pages.index),
            Route("/data/{name:path}.json", pages.data),
            Route("/media/{run}/{key}/file", pages.file),
            Route("/media/{run}/{key}/sound.wav", pages.sound),
            Route("/media/{run}/{key}/frame-{number:int}.jpg", pages.frame),
            Route("/report/{run}", pages.report),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, token=token, names=names_of(host), cookie=cookie)],
    )


class Pages:
    """What each address answers. Files are read in threads."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self._sounds = tempfile.TemporaryDirectory(prefix="avatar-view-")

    async def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def data(self, request: Request) -> Response:
        """A resource; 304 where the reader has it as it is."""
        name = request.path_params["name"]
        try:
            stamp = await run_sync(self.resources.stamp, name)
            tag = f'W/"{hashlib.sha256(repr((name, stamp)).encode()).hexdigest()[:24]}"'
            headers = {"etag": tag, "cache-control": "no-cache"}
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            body = await run_sync(lambda: encoded(self.resources.get(name)))
        except NoSuchResourceError as error:
            return PlainTextResponse(f"{error}\n", 404)
        if "gzip" in request.headers.get("accept-encoding", "") and len(body) > LEAST_ZIPPED:
            body = await run_sync(lambda: gzip.compress(body, 3))
            headers |= {"content-encoding": "gzip", "vary": "accept-encoding"}
        return Response(body, media_type="application/json", headers=headers)

    async def file(self, request: Request) -> Response:
        """A clip as it is, in byte ranges where they are asked for."""

        def found() -> Response:
            path = self._path(request)
            return FileResponse(
                path,
                media_type=TYPES[path.suffix.lower()],
                headers={"cache-control": "private, max-age=600"},
            )

        return await _answered(found)

    async def sound(self, request: Request) -> Response:
        """A clip's sound as WAV: a file, so that it can be sought in."""

        def found() -> Response:
            path = Path(self._sounds.name) / f"{request.path_params['key']}.wav"
            clip = self._clip(request)
            if not path.is_file():
                path.write_bytes(self.resources.shelf.wav(clip, self._path(request)))
            return FileResponse(path, media_type="audio/wav")

        return await _answered(found)

    async def frame(self, request: Request) -> Response:
        def found() -> Response:
            clip = self._clip(request)
            frames = self.resources.shelf.frames(clip, self._path(request))
            number = request.path_params["number"]
            if number >= len(frames):
                raise NoSuchResourceError(f"it has {len(frames)} frames")
            return Response(
                frames[number],
                media_type="image/jpeg",
                headers={"cache-control": "private, max-age=600"},
            )

        return await _answered(found)

    async def report(self, request: Request) -> Response:
        """The run's own report; it needs nothing but itself."""

        def found() -> Response:
            path = self.resources.folder(request.path_params["run"]) / "report.html"
            if not path.is_file():
                raise NoSuchResourceError("this run has no report yet")
            # It has scripts and styles of its own: it gets an origin of its own, too.
            policy = (
                "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                "img-src data:; sandbox allow-scripts"
            )
            return FileResponse(path, headers={"content-security-policy": policy})

        return await _answered(found)

    def _clip(self, request: Request) -> Clip:
        run = self.resources.folder(request.path_params["run"])
        return self.resources.clip(run, request.path_params["key"])

    def _path(self, request: Request) -> Path:
        run = self.resources.folder(request.path_params["run"])
        return self.resources.shelf.find(self._clip(request), self.resources.roots(run))


async def _answered(found: Callable[[], Response]) -> Response:
    """What ``found`` gives, made in a thread; 404 with the reason where it is not there."""
    try:
        return await run_sync(found)
    except (AvatarError, OSError) as error:
        return PlainTextResponse(f"{error}\n", 404)


def encoded(document: Json) -> bytes:
    """JSON; NaN and infinity are null."""
    return msgspec.json.encode(document)


def new_token() -> str:
    """256 random bits, or what AVATAR_VIEW_TOKEN says. Raises ConfigError where that is short."""
    given = os.environ.get(TOKEN_ENV)
    if given is None:
        return secrets.token_urlsafe(32)
    if len(given) < SHORTEST_TOKEN or not given.isascii() or not given.isprintable():
        raise ConfigError(
            f"{TOKEN_ENV} has {len(given)} characters: give at least {SHORTEST_TOKEN} printable "
            "ASCII ones, or leave it out for a random token"
        )
    return given


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ResourceError that names host and port."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"avatar view cannot listen on {host}:{port} ({why}); give another --port, or --port 0 "
            "for any that is free"
        ) from error


def address(host: str, port: int, token: str, run: str = "") -> str:
    """The page's address, which lets in whoever has it."""
    shown = host.strip("[]") if host not in ("0.0.0.0", "::") else socket.gethostname()
    place = f"[{shown}]" if ":" in shown else shown
    return f"http://{place}:{port}/?token={quote(token)}" + (f"#/run/{quote(run)}" if run else "")


def serve(
    resources: Resources,
    *,
    host: str,
    port: int,
    run: str = "",
    say: Callable[[str], None] = print,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted. ``say`` is told the address, ``on_ready`` gets it alone."""
    token = new_token()
    with listen(host, port) as listening:
        port = listening.getsockname()[1]
        app = application(resources, token=token, host=host, cookie=f"avatar_view_{port}")
        where = address(host, port, token, run)
        say(f"{len(resources.names())} runs of {resources.parent} at\n\n  {where}\n")
        if host.strip("[]") not in LOOPBACK_NAMES:
            say("Others who know this address can read prompts, completions and media.")
        say("Ctrl-C ends it.")
        if on_ready is not None:
            on_ready(where)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="off"
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            say("stopped")
