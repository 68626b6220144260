"""Killed and gone on with, a run at staleness 0 trains what it would have trained in peace
(docs/survival.md)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from avatar_rl.cluster.checkpoints.checkpoint import checkpoints
from avatar_rl.cluster.services.run_buffer import open_buffer
from avatar_rl.cluster.services.services import CPU_ENVIRONMENT, ENVIRONMENT
from avatar_rl.cluster.telemetry.run_files import list_runs, read_metrics, read_status
from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from avatar_rl.prompts.synthetic.world import synthesize
from tests.small_run import assert_ended_in_order

STEPS, PROMPTS = 12, 4
ROOT = Path(__file__).parents[2]


def recipe(folder: Path) -> dict[str, Any]:
    """Replay from the second step on, KL, hints and warm-up; a checkpoint after every second
    step."""
    return {
        "name": "survivor",
        "seed": 5,
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "world" / "train.jsonl"),
            "template": {"min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 256},
        },
        "loop": {
            "steps": STEPS,
            "prompts_per_step": PROMPTS,
            "fresh": 2,
            "replayed": 2,
            "max_staleness": 0,
        },
        "rollout": {
            "max_sequences": 16,
            "engine": {"max_model_len": 320, "max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20},
            "sampling": {"max_tokens": 32},
        },
        "rewards": {
            "weights": {
                "tests.integration.test_reference_loop:letters_reward": 1.0,
                "accuracy": 0.0,
            }
        },
        "buffer": {"warm_up": 16, "capacity": 48, "hints": {"zero_patience": 1}},
        "learner": {"objective": {"beta": 0.1}, "optimizer": {"lr": 5.0e-4}, "warmup": 0.5},
        "probe": {"prompts": 0},
        "checkpoint": {"every": 2},
        "output": {"cache": str(folder / "cache"), "samples_every": 0, "report": False},
        "screen": "plain",
    }


class Job:
    """`avatar train` in a session of its own."""

    def __init__(self, folder: Path, runs: Path, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "avatar_rl.cluster.cli",
            "train",
            str(folder / "recipe.yaml"),
        ]
        self.runs = runs
        self.lines: list[str] = []
        self.before = set(os.listdir("/dev/shm"))
        self.process = subprocess.Popen(
            [*command, "--output.folder", str(runs), *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **CPU_ENVIRONMENT},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def until(self, text: str) -> None:
        """Read its output up to a line with ``text``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)[-3000:]}")

    def finish(self) -> str:
        rest, _ = self.process.communicate(timeout=240)
        return "".join(self.lines) + rest

    def kill_worker(self, name: str, within_s: float = 0.0) -> None:
        """SIGKILL to the process of this job whose name begins so, waited for."""
        deadline = time.monotonic() + within_s
        while True:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if " ".join(child.cmdline()).startswith(name) or name in child.name():
                        child.kill()
                        return
            assert time.monotonic() < deadline, f"there is no {name}"
            time.sleep(0.05)

    @property
    def run(self) -> Path:
        [status] = list_runs(self.runs)
        return self.runs / status.run_id


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def alive(processes: list[psutil.Process], within_s: float) -> list[str]:
    """Those still there after at most ``within_s``."""
    _, left = psutil.wait_procs(processes, timeout=within_s)
    return [str(process) for process in left if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    build_tiny_omni(folder / "model")
    synthesize(folder / "world", WorldConfig(n_train=16, n_heldout=1, n_sft=1))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    return folder


@pytest.fixture(scope="module")
def peaceful(folder: Path) -> Path:
    job = Job(folder, folder / "peaceful")
    output = job.finish()
    assert job.process.returncode == 0, output[-3000:]
    return job.run


def events(run: Path) -> list[str]:
    return [str(row["kind"]) for row in read_jsonl(run / "events.jsonl")]


def assert_the_same(run: Path, peaceful: Path, start: Path) -> None:
    """Parameters within the tolerance of the reference loop, equal books and statistics, each step
    logged once."""
    trained, expected = (
        load_file(path / "checkpoint" / "model.safetensors") for path in (run, peaceful)
    )
    before = load_file(start / "model.safetensors")

    def norm(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
        return float(
            torch.stack(
                [(left[name].double() - right[name].double()).norm() for name in left]
            ).norm()
        )

    assert norm(expected, before) > 0
    assert norm(trained, expected) < 1e-4 * norm(expected, before)
    rows, wanted = ([row for row in read_metrics(path) if row["step"]] for path in (run, peaceful))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    raw = [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    assert raw == sorted(set(raw))
    for row, want in zip(rows, wanted, strict=True):
        for name in (
            "reward/mean",
            "tokens/trained",
            "hints/visits",
            "buffer/stored",
            "version",
            "lr",
        ):
            assert row[name] == want[name], (row["step"], name)
    found = []
    for path in (run, peaceful):
        with open_buffer(str(path), url=None) as buffer:
            books, stats = buffer.stats.check_ledger(), buffer.stats.read()
            assert books.generated == books.trained_fresh == STEPS * PROMPTS
            found.append(
                (
                    stats.tiers,
                    stats.stock,
                    stats.prompts,
                    stats.mean_rbar,
                    stats.version,
                    stats.trained_step,
                )
            )
    assert found[0] == found[1]


@pytest.fixture
def job_to_kill(folder: Path, tmp_path: Path) -> Iterator[Job]:
    job = Job(folder, tmp_path / "runs")
    yield job
    if job.process.poll() is None:
        job.process.kill()


def test_a_killed_job_leaves_no_orphan_and_goes_on_from_its_last_whole_checkpoint(
    folder: Path, peaceful: Path, job_to_kill: Job
) -> None:
    job = job_to_kill
    job.until("checkpoint written: step 4")
    mine = descendants(job.process.pid)
    job.process.kill()
    job.process.wait()
    assert len(mine) > 5 and alive(mine, within_s=20) == []
    newest, before, *_ = checkpoints(job.run)
    victim = next((newest / "learner" / "state").glob("mp_rank*"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert read_status(job.run).lost

    again = Job(folder, job.runs, "--resume", "auto")
    output = again.finish()
    assert again.process.returncode == 0, output[-3000:]
    assert f"{newest.name}: learner/state/{victim.name} is damaged" in output
    assert f"resuming {job.run.name} from step {int(before.name[5:])}" in output
    assert "was left behind by process" in output  # its lock
    assert (job.run / "metrics.abandoned.jsonl").is_file()
    assert_the_same(job.run, peaceful, folder / "model")


def test_deaths_in_mid_run_change_nothing_and_sigterm_saves(
    folder: Path, peaceful: Path, job_to_kill: Job
) -> None:
    job = job_to_kill
    job.until("starting actors")
    for name in ("ray::RolloutActor", "ray::LearnerRank"):
        job.kill_worker(name, within_s=60)
    job.until("is replaced")
    job.until("is replaced")
    job.until("step  1/")
    job.kill_worker("ray::LearnerRank")
    job.until("learner restarted")
    job.until(" step ")
    job.kill_worker("ray::RewardActor")
    job.until(" step ")
    job.kill_worker("redis-server")
    job.until("redis restarted")
    job.until(" step ")
    mine = descendants(job.process.pid)
    job.process.send_signal(signal.SIGTERM)  # test_scaling asks with SIGINT
    output = job.finish()
    assert job.process.returncode == 0, output[-3000:]
    assert "resume with --resume auto" in output
    assert alive(mine, within_s=20) == []
    assert_ended_in_order(job.process, job.run, job.before)
    status = read_status(job.run)
    assert status.state == "interrupted" and 0 < status.step < STEPS
    assert int(checkpoints(job.run)[0].name[5:]) >= status.step

    early = Job(folder, job.runs, "--resume", job.run.name)
    early.until("starting actors")
    mine = descendants(early.process.pid)
    early.process.send_signal(signal.SIGTERM)  # pre-empted again, before it has done anything
    output = early.finish()
    assert early.process.returncode == 0 and "resume with --resume auto" in output, output[-3000:]
    assert alive(mine, within_s=20) == []
    assert read_status(job.run).state == "interrupted"

    again = Job(folder, job.runs, "--resume", job.run.name)
    again.until("resuming")
    rival = Job(folder, job.runs, "--resume", job.run.name)  # two jobs, one run
    assert "is under way as process" in rival.finish() and rival.process.returncode == 1
    output = again.finish()
    assert again.process.returncode == 0, output[-3000:]
    assert_the_same(job.run, peaceful, folder / "model")
    assert {"learner died", "learner restarted", "redis restarted"} <= set(events(job.run))


@pytest.mark.chaos
def test_a_learner_whose_state_nobody_holds_takes_the_run_back_to_its_checkpoint(
    folder: Path, peaceful: Path, tmp_path: Path
) -> None:
    job = Job(folder, tmp_path / "unheld", "--checkpoint.replica_bytes", "0")
    job.until("checkpoint written: step 4")
    job.kill_worker("ray::LearnerRank")
    output = job.finish()
    assert job.process.returncode == 0, output[-3000:]
    assert "the run goes back to its last checkpoint" in output and "resuming" in output
    assert_the_same(job.run, peaceful, folder / "model")


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_two_ranks_that_die_in_mid_run_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Both at once, then the second alone, which leaves the first in the middle of a collective."""
    two = ("--learner.ranks", "2", "--learner.optimizer.zero_stage", "2")
    peace = Job(folder, tmp_path / "peace", *two)
    output = peace.finish()
    assert peace.process.returncode == 0, output[-3000:]
    job = Job(folder, tmp_path / "killed", *two)
    try:
        job.until("step  1/")
        ranks = [
            child
            for child in descendants(job.process.pid)
            if "LearnerRank" in " ".join(child.cmdline())
        ]
        assert len(ranks) == 2
        for rank in ranks:
            rank.kill()
        job.until("learner restarted")
        job.until(" step ")
        *_, second = sorted(
            (
                child
                for child in descendants(job.process.pid)
                if "LearnerRank" in " ".join(child.cmdline())
            ),
            key=lambda child: child.create_time(),
        )
        second.kill()
        job.until("learner restarted")
        output = job.finish()
        assert job.process.returncode == 0, output[-3000:]
    finally:
        if job.process.poll() is None:
            job.process.kill()
    assert_the_same(job.run, peace.run, folder / "model")


def test_another_recipe_or_model_cannot_go_on_with_it(
    folder: Path, peaceful: Path, tmp_path: Path
) -> None:
    changed = Job(
        folder, peaceful.parent, "--resume", peaceful.name, "--learner.optimizer.lr", "1.0e-3"
    )
    output = changed.finish()
    assert changed.process.returncode == 1
    assert "learner.optimizer.lr: 0.0005 -> 0.001" in output
    over = Job(folder, peaceful.parent, "--resume", peaceful.name)
    assert "is finished after 12 steps: raise loop.steps" in over.finish()


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("title", "key", "seconds", "messages"),
    [
        ("ray::RolloutActor", "stall_s", 4, ("rollout actor stalled", "died and is replaced")),
        ("ray::LearnerRank", "learner_stall_s", 6, ("learner stalled", "learner restarted")),
    ],
)
def test_what_stands_still_is_replaced(
    folder: Path, tmp_path: Path, title: str, key: str, seconds: int, messages: tuple[str, str]
) -> None:
    job = Job(
        folder, tmp_path / "stalled", f"--supervision.{key}", str(seconds), "--loop.steps", "400"
    )
    try:
        job.until("step   2/")
        [worker] = [
            child for child in descendants(job.process.pid) if title in " ".join(child.cmdline())
        ]
        worker.suspend()
        started = time.monotonic()
        job.until(messages[0])
        assert time.monotonic() - started >= 3
        job.until(messages[1])
        job.until(" step ")
        job.until(" step ")
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        job.process.send_signal(signal.SIGINT)
        output = job.finish()
        assert job.process.returncode == 130, output[-3000:]
    finally:
        if job.process.poll() is None:
            job.process.kill()


# -- engine and learner by turns on one device (docs/one-gpu.md) ---------------------------------

COLOCATE = ("--resources.colocate", "true", "--probe.prompts", "2")


def told(run: Path) -> list[tuple[str, int, bool]]:
    """(side, pid, holds) of every line of the run's lock, in order."""
    rows = [json.loads(line) for line in (run / "device.turns").read_text().splitlines()]
    return [(row["who"].split("-")[0], row["pid"], row["holds"]) for row in rows]


def assert_never_together(run: Path, killed: set[int]) -> int:
    """No side takes the device while a living process of the other has it; returns how often the
    learner took it."""
    holders: dict[int, str] = {}
    taken = 0
    for side, pid, holds in told(run):
        if not holds:
            assert holders.pop(pid) == side
            continue
        others = {pid for pid, other in holders.items() if other != side}
        assert others <= killed, f"{side} began while {others} had the device"
        for gone in others:
            del holders[gone]
        holders[pid] = side
        taken += side == "learner"
    return taken


def test_a_colocated_run_trains_what_a_plain_one_trains(
    folder: Path, peaceful: Path, tmp_path: Path
) -> None:
    job = Job(folder, tmp_path / "runs", *COLOCATE)
    output = job.finish()
    assert job.process.returncode == 0, output[-3000:]
    assert_the_same(job.run, peaceful, folder / "model")
    # Loading and the probe's scores, then every step; the export follows the last one.
    assert assert_never_together(job.run, set()) >= STEPS + 1
    rows = [row for row in read_metrics(job.run) if row["step"]]
    assert all(row["staleness/max"] == 0 and row["time/turns"] > 0 for row in rows)


def kill_in_turn(job: Job, turn: str, victim: str) -> int:
    """SIGKILL to the ``victim``'s process as soon as ``turn`` has the device anew; its pid."""
    title = {"rollout": "ray::RolloutActor", "learner": "ray::LearnerRank"}[victim]
    seen = len(told(job.run))
    deadline = time.monotonic() + 120
    while True:
        lines = told(job.run)
        if len(lines) > seen and lines[-1][0] == turn and lines[-1][2]:
            for child in psutil.Process(job.process.pid).children(recursive=True):
                if " ".join(child.cmdline()).startswith(title):
                    child.kill()
                    return child.pid
        assert time.monotonic() < deadline, f"{turn} never had the device, or there is no {victim}"
        time.sleep(0.001)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_kill_in_any_phase_of_either_side_loses_nothing(
    folder: Path, peaceful: Path, tmp_path: Path
) -> None:
    job = Job(folder, tmp_path / "killed", *COLOCATE)
    killed: set[int] = set()
    try:
        job.until("step  1/")
        for turn, victim, message in (
            ("rollout", "rollout", "died and is replaced"),
            ("learner", "rollout", "died and is replaced"),
            ("rollout", "learner", "learner restarted"),
            ("learner", "learner", "learner restarted"),
        ):
            killed.add(kill_in_turn(job, turn, victim))
            job.until(message)
            job.until(" step ")
        output = job.finish()
        assert job.process.returncode == 0, output[-3000:]
    finally:
        if job.process.poll() is None:
            job.process.kill()
    assert_the_same(job.run, peaceful, folder / "model")
    assert_never_together(job.run, killed)
    kinds = events(job.run)
    assert kinds.count("rollout actor died") == 2 and kinds.count("learner restarted") == 2
