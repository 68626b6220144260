"""A hub of datasets on loopback, answering what huggingface_hub asks: a revision's commit, the tree
of a commit in pages, and files with ranges."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"
PAGE = 2  # files a page of the tree


class LocalHub:
    """What the hub holds, how it misbehaves, and what it was asked."""

    def __init__(self, repo: str, files: dict[str, bytes], lfs: tuple[str, ...] = ()) -> None:
        self.repo, self.files, self.lfs = repo, files, lfs
        self.damaged: set[str] = set()  # files that come with a wrong byte
        self.slow_after: dict[str, int] = {}  # bytes after which a file stands still
        self.needs_token: str | None = None
        self.gated = False
        self.status = 200  # of every answer, where it is another
        self.asked: list[tuple[str, str | None]] = []  # path, Range
        self.tokens: set[str | None] = set()
        self.url = ""

    def tree(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for path, content in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
            row["oid"] = git
            if path in self.lfs:
                sha = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            found.append(row)
        return found


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            query = parse_qs(urlsplit(self.path).query)
            hub.asked.append((path, self.headers.get("Range")))
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.status != 200:
                return self.answer(hub.status, b"{}")
            if hub.gated:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if hub.needs_token and self.headers.get("Authorization") != f"Bearer {hub.needs_token}":
                return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            api = f"/api/datasets/{hub.repo}"
            if path.startswith(f"{api}/revision/"):
                if path.rpartition("/")[2] not in ("main", COMMIT):
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return self.json({"id": hub.repo, "sha": COMMIT, "siblings": []})
            if path.startswith(f"{api}/tree/{COMMIT}"):
                begin = int(query.get("cursor", ["0"])[0])
                rows = hub.tree()
                more = {}
                if begin + PAGE < len(rows):
                    url = f"{hub.url}{api}/tree/{COMMIT}?recursive=true&cursor={begin + PAGE}"
                    more = {"Link": f'<{url}>; rel="next"'}
                return self.json(rows[begin : begin + PAGE], more)
            head = f"/datasets/{hub.repo}/resolve/{COMMIT}/"
            if path.startswith(head) and path.removeprefix(head) in hub.files:
                return self.file(path.removeprefix(head))
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def json(self, value: object, headers: dict[str, str] | None = None) -> None:
            self.answer(200, json.dumps(value).encode(), headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def file(self, name: str) -> None:
            content = hub.files[name]
            if name in hub.damaged:
                content = bytes([content[0] ^ 1]) + content[1:]
            begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=")[:-1])
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header(
                    "Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}"
                )
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            if self.command != "GET":
                return
            stop = hub.slow_after.get(name)
            if stop is not None and begin < stop:
                self.wfile.write(content[begin:stop])
                self.wfile.flush()
                time.sleep(60)  # until whoever asked is gone
                return
            self.wfile.write(content[begin:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
