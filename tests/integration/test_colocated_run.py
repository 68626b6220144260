"""Engine and learner by turns on one device: the run of test_survival.py, undisturbed and killed in
every phase, trains what it trains with both at work (docs/one-gpu.md)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
import yaml

from avatar_rl.cluster.telemetry.run_files import read_metrics
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from avatar_rl.prompts.synthetic.world import synthesize
from tests.integration.test_survival import STEPS, Job, assert_the_same, events, recipe

COLOCATE = ("--resources.colocate", "true", "--probe.prompts", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colocated")
    build_tiny_omni(folder / "model")
    synthesize(folder / "world", WorldConfig(n_train=16, n_heldout=1, n_sft=1))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """Both at work at any time, at the same staleness."""
    job = Job(folder, folder / "plain")
    output = job.finish()
    assert job.process.returncode == 0, output[-3000:]
    return job.run


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
    folder: Path, plain: Path, tmp_path: Path
) -> None:
    job = Job(folder, tmp_path / "runs", *COLOCATE)
    output = job.finish()
    assert job.process.returncode == 0, output[-3000:]
    assert_the_same(job.run, plain, folder / "model")
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
    folder: Path, plain: Path, tmp_path: Path
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
    assert_the_same(job.run, plain, folder / "model")
    assert_never_together(job.run, killed)
    kinds = events(job.run)
    assert kinds.count("rollout actor died") == 2 and kinds.count("learner restarted") == 2
