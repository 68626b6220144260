"""Ray nodes with addresses of their own, in network namespaces: a slow link, a checkpoint link,
files that are not shared."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from avatar_rl.buffer_service.redis.server import find_redis_server
from avatar_rl.cluster.telemetry.run_files import read_metrics, read_status
from tests.small_run import RECIPE

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
NODES = 3  # the head, and two workers
PASSWORD = secrets.token_hex(16)


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def why_not() -> str:
    """Why namespaces cannot be made here; empty when they can."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "needs root and iproute2"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode == 0:
        command("ip", "netns", "del", name)
    return made.stderr.strip()


class Hosts:
    """``NODES`` namespaces on one bridge, 10.77.x.1 and up, with a Redis and a Ray node in the
    first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tag = folder, f"av{os.getpid() % 1000}"
        self.session = Path(f"/tmp/ray-{secrets.token_hex(3)}")
        self.net = f"10.77.{os.getpid() % 250}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.unshared = folder / "unshared"
        self.unshared.mkdir()
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        } | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "AVATAR_PASSWORD": PASSWORD,
        }

    def name(self, node: int) -> str:
        return f"{self.tag}n{node}"

    def address(self, node: int) -> str:
        return f"{self.net}.{node + 1}"

    def spawn(self, node: int, *words: str, log: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{log}.log").open("wb") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name(node), *words],
                env=self.environment,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        bridge = f"{self.tag}br"
        command("ip", "link", "add", bridge, "type", "bridge")
        command("ip", "link", "set", bridge, "up")
        for node in range(NODES):
            inside, outside = f"{self.tag}i{node}", f"{self.tag}o{node}"
            command("ip", "netns", "add", self.name(node))
            command("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            command("ip", "link", "set", inside, "netns", self.name(node))
            command("ip", "link", "set", outside, "master", bridge, "up")
            for words in (
                f"addr add {self.address(node)}/24 dev {inside}",
                f"link set {inside} up",
                "link set lo up",
            ):
                command("ip", "-n", self.name(node), *words.split())
        self.spawn(
            0,
            find_redis_server(),
            "--bind",
            self.address(0),
            "127.0.0.1",
            "--port",
            "6400",
            "--requirepass",
            PASSWORD,
            "--save",
            "",
            "--dir",
            str(self.folder),
            log="redis",
        )
        for node in range(NODES):
            place = (
                ["--head", "--port=6379"] if node == 0 else [f"--address={self.address(0)}:6379"]
            )
            # `ip netns exec` brings a mount namespace too: one folder of the last node is its own.
            apart = (
                ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(self.unshared)]
                if node == 2
                else []
            )
            self.spawn(
                node,
                *apart,
                str(RAY),
                "start",
                *place,
                "--block",
                f"--node-ip-address={self.address(node)}",
                "--num-cpus=2",
                "--object-store-memory=200000000",
                "--disable-usage-stats",
                f"--labels=host=n{node}",
                *(["--include-dashboard=false", f"--temp-dir={self.session}"] if node == 0 else []),
                log=f"ray{node}",
            )
            deadline = time.monotonic() + 90
            while "Ray runtime started" not in self.log(f"ray{node}"):
                assert time.monotonic() < deadline, self.log(f"ray{node}")
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for node in range(NODES):
            subprocess.run(["ip", "netns", "del", self.name(node)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.tag}br"], capture_output=True)
        shutil.rmtree(self.session, ignore_errors=True)

    def slow(self, node: int, rate_mbit: int) -> None:
        """Towards the node; a token bucket, which every kernel has, unlike netem with its
        delays."""
        command(
            "tc",
            "qdisc",
            "add",
            "dev",
            f"{self.tag}o{node}",
            "root",
            "tbf",
            "rate",
            f"{rate_mbit}mbit",
            "burst",
            "64kb",
            "latency",
            "100ms",
        )

    def cut(self, node: int, seconds: float) -> None:
        command("ip", "link", "set", f"{self.tag}o{node}", "down")
        time.sleep(seconds)
        command("ip", "link", "set", f"{self.tag}o{node}", "up")

    def train(self, *overrides: str, folder: Path | None = None) -> subprocess.Popen[bytes]:
        (self.folder / "recipe.yaml").write_text(RECIPE)
        return self.spawn(
            0,
            sys.executable,
            "-m",
            "avatar_rl.cluster.cli",
            "train",
            str(self.folder / "recipe.yaml"),
            "--cold_start",
            "null",
            "--learner.ranks",
            "1",
            "--evaluation.every",
            "0",
            "--output.export",
            "false",
            "--resources.address",
            f"{self.address(0)}:6379",
            "--resources.learner_labels",
            "{host: n0}",
            "--output.folder",
            str((folder or self.folder) / "runs"),
            "--output.cache",
            str(self.folder / "cache"),
            *overrides,
            log="train",
        )

    def redis(self) -> tuple[str, ...]:
        return (
            "--buffer.url",
            f"redis://{self.address(0)}:6400",
            "--buffer.password_env",
            "AVATAR_PASSWORD",
        )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(f"no network namespaces: {reason}")
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def until(
    run: Path, steps: int, process: subprocess.Popen[bytes], hosts: Hosts, deadline_s: float = 240
) -> None:
    """Wait until the run has finished ``steps`` steps."""
    deadline = time.monotonic() + deadline_s
    while sum(row["step"] is not None and row["step"] > 0 for row in read_metrics(run)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, hosts.log("train")[-3000:]
        time.sleep(0.3)


def test_the_embedded_redis_is_refused_on_several_nodes(hosts: Hosts) -> None:
    process = hosts.train()
    assert process.wait(180) == 1
    assert (
        "the cluster has 3 nodes, but the embedded Redis answers only on the driver's"
        in hosts.log("train")
    )
    shutil.rmtree(hosts.folder / "runs")


def test_a_folder_that_is_not_shared_is_named_with_its_node(hosts: Hosts) -> None:
    process = hosts.train(*hosts.redis(), folder=hosts.unshared)
    assert process.wait(180) == 1
    said = hosts.log("train")
    assert f"node {hosts.address(2)} does not see {hosts.unshared}/runs/" in said, said[-3000:]


def test_a_run_survives_a_slow_and_a_cut_link(hosts: Hosts) -> None:
    """Rollout actors live on the workers, the learner and Redis on the head."""
    process = hosts.train(
        *hosts.redis(),
        "--loop.steps",
        "14",
        "--rollout.workers",
        "2",
        "--rollout.max_workers",
        "2",
        "--resources.rollout_labels",
        "{host: 'in(n1,n2)'}",
        "--rollout.lease_s",
        "5",
        "--buffer.reconnect_s",
        "60",
    )
    deadline = time.monotonic() + 60
    while not list(hosts.folder.glob("runs/*/status.json")):
        assert process.poll() is None and time.monotonic() < deadline, hosts.log("train")
        time.sleep(0.2)
    [run] = (hosts.folder / "runs").iterdir()
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline, hosts.log("train")[-3000:]
        time.sleep(0.3)
    until(run, 2, process, hosts)
    hosts.slow(1, rate_mbit=20)
    until(run, 5, process, hosts)
    hosts.cut(2, seconds=4.0)
    assert process.wait(400) == 0, hosts.log("train")[-3000:]
    assert read_status(run).state == "finished"
    rows = [row for row in read_metrics(run) if row["step"]]
    assert [row["step"] for row in rows] == list(range(1, 15)) and {
        row["groups/fresh"] for row in rows
    } == {4}
    assert "ledger closed" in (run / "events.jsonl").read_text()
