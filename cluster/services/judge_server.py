"""A judge that the run serves itself: vLLM's server as a child process on loopback
(rewards.judge.kind: managed)."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.rewards.config import JudgeConfig

KEY_VARIABLE = "AVATAR_JUDGE_KEY"
SERVED_NAME = "judge"
POLL_S = 0.2
STOP_S = 15.0
_LAST_LINES = 12
#: Without the proxies of the environment, which would not find our loopback.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class JudgeServer:
    """Started by ``start``, ready when that returns; ``stop`` ends the process and all its
    children.

    The key is random, lives in the environment of server and clients only, and never in an argument
    or a file."""

    def __init__(
        self, config: JudgeConfig, log: Path, *, port: int, command: Sequence[str] | None = None
    ) -> None:
        """``command`` replaces vLLM's (it must answer /health on ``port``)."""
        self.config, self.log, self.port = config, log, port
        self.key = secrets.token_urlsafe(32)
        self._command = list(command) if command is not None else self._serve()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> JudgeConfig:
        """What a reward actor needs to ask it; the key is in ``environment``."""
        return self.config.model_copy(
            update={
                "kind": "openai",
                "base_url": f"http://127.0.0.1:{self.port}/v1",
                "model": SERVED_NAME,
                "api_key_env": KEY_VARIABLE,
            }
        )

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the processes that ask it."""
        return {KEY_VARIABLE: self.key}

    def start(self) -> JudgeServer:
        """Raises ConfigError for a missing model folder, ResourceError when it exits or is not
        ready in time."""
        path = self.config.managed.path
        if path is None or not path.is_dir():
            raise ConfigError(
                f"rewards.judge.managed.path {path} is not a model folder: give a Hugging Face "
                "checkpoint"
            )
        environment = {
            **os.environ,
            "VLLM_API_KEY": self.key,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        managed = self.config.managed
        if managed.gpus == 0:
            environment |= {
                "OMP_NUM_THREADS": str(managed.threads),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
            environment |= {"TORCH_COMPILE_DISABLE": "1"}
        if managed.visible_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = managed.visible_devices
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)  # the engine is a child of the server
            except ProcessLookupError:
                break
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                continue

    def _serve(self) -> list[str]:
        managed = self.config.managed
        settings = [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            SERVED_NAME,
            "--max-model-len",
            str(managed.max_model_len),
        ]
        parallel = ["--tensor-parallel-size", str(managed.gpus)] if managed.gpus > 1 else []
        eager = [] if managed.gpus else ["--enforce-eager"]
        # not the `vllm` command: it looks for a distribution of that name, which the CPU build does
        # not have
        vllm = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(managed.path),
        ]
        return [*vllm, *settings, *parallel, *eager, *managed.arguments]

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.config.managed.start_timeout_s
        while True:
            code = self._process.poll()
            if code is not None:
                raise ResourceError(
                    f"the judge's server exited with {code} while starting: {self._tail()}"
                )
            if self._healthy():
                return
            if time.monotonic() > deadline:
                raise ResourceError(
                    "the judge's server was not ready after "
                    f"{self.config.managed.start_timeout_s:g} s "
                    f"(rewards.judge.managed.start_timeout_s): {self._tail()}"
                )
            time.sleep(POLL_S)

    def _healthy(self) -> bool:
        try:
            with _DIRECT.open(f"http://127.0.0.1:{self.port}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _tail(self) -> str:
        """The end of its log; the whole is in ``log``."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return f"{' | '.join(lines) or 'it said nothing'} (whole log: {self.log})"
