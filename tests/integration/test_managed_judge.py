"""The judge that a run serves itself, with a small HTTP server in place of vLLM."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from avatar_rl.cluster.services.judge_server import KEY_VARIABLE, JudgeServer
from avatar_rl.cluster.services.services import free_port
from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.rewards.config import JudgeConfig, RewardConfig
from avatar_rl.rewards.suite import build_judge

SERVER = """
import os, sys, subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key = f"Bearer {os.environ['VLLM_API_KEY']}"
        allowed = self.path == "/health" or self.headers.get("Authorization") == key
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *arguments):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def config(path: Path, timeout: float = 30.0) -> JudgeConfig:
    return JudgeConfig.model_validate(
        {"kind": "managed", "managed": {"path": path, "start_timeout_s": timeout}}
    )


def test_it_is_ready_when_started_and_gone_with_its_children_when_stopped(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    server = JudgeServer(
        config(tmp_path), tmp_path / "judge.log", port=port, command=command
    ).start()
    client = server.client
    assert (client.kind, client.base_url, client.api_key_env) == (
        "openai",
        f"http://127.0.0.1:{port}/v1",
        KEY_VARIABLE,
    )
    key = server.environment[KEY_VARIABLE]
    assert httpx.get(f"{client.base_url}/models").status_code == 401
    assert (
        httpx.get(
            f"{client.base_url}/models", headers={"Authorization": f"Bearer {key}"}
        ).status_code
        == 200
    )
    assert key not in " ".join(command) and KEY_VARIABLE not in os.environ
    child = int((tmp_path / "judge.log").read_text().split()[1])
    server.stop()
    server.stop()
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, "the server's child outlives it"
        time.sleep(0.05)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such architecture')"]
    with pytest.raises(ResourceError, match=r"exited with 1 while starting: no such architecture"):
        JudgeServer(
            config(tmp_path), tmp_path / "judge.log", port=free_port(), command=command
        ).start()


def test_a_server_that_never_answers_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    server = JudgeServer(
        config(tmp_path, 1.5), tmp_path / "judge.log", port=free_port(), command=command
    )
    with pytest.raises(ResourceError, match=r"not ready after 1.5 s .*loading"):
        server.start()
    assert server._process is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path names no model"):
        JudgeConfig(kind="managed")
    with pytest.raises(ConfigError, match="is not a model folder"):
        JudgeServer(config(tmp_path / "nowhere"), tmp_path / "judge.log", port=1).start()
    with pytest.raises(ConfigError, match="needs a run that starts the judge"):
        build_judge(config(tmp_path))


def test_rewards_know_whether_they_ask_a_judge() -> None:
    assert (
        RewardConfig(weights={"judge": 0.5}).asks_judge
        and RewardConfig(weights={"segment_consistency": 1}).asks_judge
    )
    assert not RewardConfig().asks_judge
