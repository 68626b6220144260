"""A run on a Ray cluster of its own: submitted as a job, token authentication on, Redis by URL."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.telemetry.run_files import read_status
from tests.small_run import RECIPE

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass
class Cluster:
    """A head node with a dashboard, for jobs."""

    environment: dict[str, str]
    address: str
    dashboard: str

    def ray(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [str(RAY), *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )

    def train(self, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of the small recipe, waited for."""
        (folder / "recipe.yaml").write_text(RECIPE)
        working = (
            folder / "job"
        )  # an empty working directory: the package is installed, as in an image
        working.mkdir(exist_ok=True)
        deadline = time.monotonic() + 90
        while True:
            done = self.ray(
                "job",
                "submit",
                "--address",
                self.dashboard,
                "--working-dir",
                str(working),
                "--",
                sys.executable,
                "-m",
                "avatar_rl.cluster.cli",
                "train",
                str(folder / "recipe.yaml"),
                "--cold_start",
                "null",
                "--learner.ranks",
                "1",
                "--rollout.workers",
                "1",
                "--evaluation.every",
                "0",
                *overrides,
            )
            # The node's job agent comes up some seconds after the dashboard.
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    port, dashboard, agent = free_ports(3)
    session = Path(f"/tmp/ray-{secrets.token_hex(3)}")  # short: it holds sockets
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(
        [
            str(RAY),
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            "--num-cpus=4",
            f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}",
            "--object-store-memory=300000000",
            "--disable-usage-stats",
            f"--temp-dir={session}",
            "--labels=pool=both",
        ],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while True:
        assert head.poll() is None and time.monotonic() < deadline, (
            folder / "head.log"
        ).read_text()
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2).close()
            break
        except urllib.error.HTTPError:
            break  # it is up, and asks for the token
        except OSError:
            time.sleep(0.3)
    yield Cluster(environment, f"127.0.0.1:{port}", url)
    head.send_signal(signal.SIGTERM)
    head.wait(60)
    log.close()
    shutil.rmtree(session, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_submitted_job_trains_on_the_cluster(
    cluster: Cluster, tmp_path: Path, small_cache: Path
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        done = cluster.train(
            tmp_path,
            "--resources.address",
            "auto",
            "--buffer.url",
            redis.url,
            "--resources.learner_labels",
            "{pool: both}",
            "--resources.rollout_labels",
            "{pool: both}",
            "--output.folder",
            str(tmp_path / "runs"),
            "--output.cache",
            str(small_cache),
            "--output.upload",
            f"file://{tmp_path}/elsewhere",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        [run] = (tmp_path / "runs").iterdir()
        assert read_status(run).state == "finished"
        with ReplayBuffer.attach(BufferConfig(), run.name, redis.url) as buffer:
            assert (
                buffer.stats.check_ledger().trained_fresh == 12 and buffer.stats.read().leased == 0
            )
    copied = tmp_path / "elsewhere" / run.name
    assert (copied / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (copied / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.timeout(300)
def test_what_the_cluster_lacks_is_named(
    cluster: Cluster, tmp_path: Path, small_cache: Path
) -> None:
    places = ("--output.folder", str(tmp_path / "runs"), "--output.cache", str(small_cache))
    done = cluster.train(
        tmp_path,
        *places,
        "--resources.learner_labels",
        "{pool: absent}",
        "--resources.start_timeout_s",
        "5",
    )
    assert done.returncode == 1 and "no node carries the label pool=absent" in done.stdout, (
        done.stdout
    )
    assert "the cluster has 1 node(s)" in done.stdout
    done = cluster.train(tmp_path)  # "runs" and "build/cache" of the job's own folder
    assert (
        done.returncode == 1
        and "give an absolute path on storage that all nodes mount" in done.stdout
    ), done.stdout


@pytest.mark.timeout(120)
def test_without_the_token_nobody_gets_in(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text(secrets.token_hex(32))
    stranger = Cluster(
        cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(other)},
        cluster.address,
        cluster.dashboard,
    )
    done = stranger.ray("job", "list", "--address", cluster.dashboard)
    assert done.returncode != 0 and "auth" in (done.stdout + done.stderr).lower()
