"""A small OpenAI-compatible chat endpoint on 127.0.0.1 that misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = (
    '{"audio_grounding_score": 0.5, "visual_id_score": 1.0, "location_acc_score": 0.0, '
    '"caption_corr_score": 0.5}'
)


@dataclass
class Reply:
    """What to answer; ``hang_s`` waits first, ``cut`` sends half, ``raw`` replaces the whole
    body."""

    content: str = GOOD
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang_s: float = 0.0
    cut: bool = False
    raw: str | None = None


@dataclass
class Server:
    url: str
    requests: list[dict[str, Any]]


@contextmanager
def judge_server(
    script: Callable[[int], Reply], models: tuple[str, ...] = ("judge",)
) -> Iterator[Server]:
    """Serve; ``script(n)`` is the reply to the n-th chat request (from 0)."""
    seen: list[dict[str, Any]] = []
    lock, closing = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = (
            True  # headers and body are two writes: 40 ms of delayed acknowledgement otherwise
        )

        def log_message(self, *args: object) -> None:
            pass

        def send(self, reply: Reply, body: bytes) -> None:
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if reply.cut else body)
            self.close_connection = reply.cut

        def do_GET(self) -> None:
            data = [
                {"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in models
            ]
            self.send(Reply(), json.dumps({"object": "list", "data": data}).encode())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(request)
                reply = script(len(seen) - 1)
            if reply.hang_s:
                closing.wait(reply.hang_s)
            message = {"role": "assistant", "content": reply.content}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            body = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "judge",
                "choices": [choice],
            }
            try:
                self.send(reply, (json.dumps(body) if reply.raw is None else reply.raw).encode())
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}/v1", seen)
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
