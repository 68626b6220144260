"""The whole run as a user starts it: the command line in a process of its own, on a world of a few clips."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from cluster.buffer_commands import open_buffer
from cluster.checkpoint import newest_cut
from cluster.telemetry import read_metrics, read_status
from learner.model import load_model

RECIPE = """
name: small
preset: avatar
data:
  synthetic: {n_train: 12, n_heldout: 6, n_sft: 16}
  template: {min_pixels: 784, max_pixels: 50176, max_prompt_tokens: 256}
cold_start: {steps: 2, batch_size: 8, ranks: 1, optimizer: {lr: 1.0e-3}}
loop: {steps: 3, prompts_per_step: 4, max_staleness: 1}
rollout:
  workers: 2
  max_sequences: 16
  engine: {max_model_len: 320, max_num_seqs: 16, kv_cache_memory_bytes: 67108864}
  sampling: {max_tokens: 16}
learner:
  ranks: 2
  micro_batch_tokens: 1500
  objective: {beta: 0.05}
  optimizer: {lr: 1.0e-4, zero_stage: 2, freeze: [visual, audio_tower]}
buffer: {warm_up: 8}
evaluation: {every: 2}
output: {samples_every: 1}
screen: plain
"""


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "cluster.cli", "train", str(folder / "recipe.yaml")]
    places = ["--output.folder", str(folder / "runs"), "--output.cache", str(folder / "cache")]
    return subprocess.Popen(
        [*command, *places, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=Path(__file__).parents[2], start_new_session=True,
        # A test suite in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def left_over(session: int) -> list[str]:
    """Command lines of processes that still belong to a session."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if os.getsid(process.pid) == session:
                found.append(" ".join(process.info["cmdline"] or []))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def until_freed(before: set[str]) -> None:
    """No shared memory is left that nobody alive uses; what other tests use at the same time is theirs."""
    deadline = time.monotonic() + 20
    while leaked := set(os.listdir("/dev/shm")) - before - in_use():
        assert time.monotonic() < deadline, f"left in /dev/shm: {leaked}"
        time.sleep(0.2)


def in_use() -> set[str]:
    """Names in /dev/shm that a living process has mapped or open."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            places = [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
            places += [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # it has just ended
            continue
        found |= {Path(place.strip()).name for place in places if place.startswith("/dev/shm/")}
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a run with two rollout actors and two learner ranks."""
    folder = tmp_path_factory.mktemp("run")
    before = set(os.listdir("/dev/shm"))
    process = start(folder)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    until_freed(before)
    [run] = (folder / "runs").iterdir()
    return run, output


def test_a_run_trains_and_says_what_came_of_it(finished: tuple[Path, str]) -> None:
    run, output = finished
    assert "tokens agree within" in output and "held-out accuracy" in output
    assert read_status(run).state == "finished"
    rows = [row for row in read_metrics(run) if row["step"]]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["version"] for row in rows] == [1, 2, 3]
    assert [row["replay/share"] for row in rows] == [0.0, 0.5, 0.5]  # warm after the first step
    assert all(row["kl/reference"] is not None and row["grad_norm"] is not None for row in rows)
    assert max(row["staleness/max"] for row in rows) <= 1
    # 4 prompts a step: 8 completions each while the buffer is cold, then 4
    assert rows[-1]["completions/generated"] == 4 * 8 + 2 * 4 * 4


def test_a_run_leaves_everything_one_looks_for(finished: tuple[Path, str]) -> None:
    run, _ = finished
    for name in ("config.yaml", "events.jsonl", "report.html", "plot.png", "checkpoint/model.safetensors"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    sample = json.loads((run / "samples" / "step_000001.jsonl").read_text().splitlines()[0])
    assert {"format", "accuracy"} <= sample["components"].keys()


def test_the_exported_policy_is_not_the_one_it_started_from(finished: tuple[Path, str]) -> None:
    run, _ = finished
    [base] = (run.parents[1] / "cache").glob("cold-start-*")
    trained, start_policy = (dict(load_model(path).named_parameters()) for path in (run / "checkpoint", base))
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, start_policy[name])}
    assert moved and not any("visual" in name or "audio_tower" in name for name in moved)  # those are frozen


def test_the_ledger_is_closed_and_the_buffer_outlives_the_run(finished: tuple[Path, str]) -> None:
    with open_buffer(str(finished[0]), url=None) as buffer:
        books = buffer.check_ledger()
        assert books.generated == books.trained_fresh == 12
        assert buffer.stats().stock == 64


def test_an_interrupted_run_leaves_no_process_and_no_shared_memory(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    process = start(tmp_path, "--loop.steps", "10000", "--cold_start", "null", "--learner.ranks", "1")
    assert process.stdout is not None
    for line in process.stdout:
        if " step " in line:
            break
    process.send_signal(signal.SIGINT)  # test_scaling asks with SIGTERM
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    [run] = (tmp_path / "runs").iterdir()
    assert_ended_in_order(process, run, before)


def assert_ended_in_order(process: subprocess.Popen[str], run: Path, before: set[str]) -> None:
    """An interrupted run is saved and reported; no process and nothing in /dev/shm (``before`` its start) is left."""
    deadline = time.monotonic() + 20
    while left_over(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_over(process.pid) == []
    until_freed(before)
    assert read_status(run).state == "interrupted"
    assert newest_cut(run, pytest.fail) is not None
    assert (run / "report.html").is_file()


def test_a_wrong_redis_password_stops_the_run_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from buffer_service.server import EmbeddedRedis

    monkeypatch.setenv("AVATAR_TEST_PASSWORD", "wrong")
    with EmbeddedRedis(tmp_path / "redis") as server:
        import redis

        redis.Redis(unix_socket_path=str(server.socket)).config_set("requirepass", "right")
        process = start(tmp_path, "--buffer.url", server.url, "--buffer.password_env", "AVATAR_TEST_PASSWORD")
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "password" in output and "wrong" not in output.replace("wrong password", "")
