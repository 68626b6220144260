"""The trackers themselves, offline: what is installed of them."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from avatar_rl.cluster.telemetry.trackers import PACKAGES
from tests.view_runs import video_file

ROOT = Path(__file__).parents[2]
#: Where each leaves what it was told, below the run or its own folder.
LEAVES = {
    "wandb": "wandb/offline-run-*/run-*.wandb",
    "trackio": "trackio/toy.db",
    "mlflow": "mlruns/*/*/metrics/reward.mean",
    "swanlab": "swanlog/run-*/run-*.swanlab",
}
CODE = """
import json, sys, time
from pathlib import Path
from avatar_rl.cluster.telemetry.trackers import Tracked, open_trackers
told = []
folder = Path(sys.argv[2])
run = Tracked("run-1", "toy", folder, {"loop": {"steps": 3}}, "abc", True)
clip = {"kind": "video", "uri": sys.argv[3]}
[one] = open_trackers([sys.argv[1]], run, metric_names="verl", tell=told.append)
first = int(sys.argv[4])
for step in (first, first + 1):
    one.write(step, {"reward/mean": step / 10, "entropy": 1.0, "entropy/fresh": 1.0})
row = {"prompt_id": "p", "question": "q", "text": "so red", "reward": 1.0}
one.samples(first, "rollout", [{**row, "media": [clip]}, row])
for _ in range(600):  # a run takes longer than its tracker's start
    if told:
        break
    time.sleep(0.1)
one.close()
print(json.dumps(told))
"""


def said(name: str, folder: Path, step: int) -> list[str]:
    """What the tracker told of two steps in a process of its own, without keys and without a
    network."""
    keys = ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in keys}
    environment |= {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    clip = video_file(folder / "clip.mp4")
    done = subprocess.run(
        [sys.executable, "-c", CODE, name, str(folder), str(clip), str(step)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told: list[str] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_keeps_everything_offline(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{name} is not installed: pip install 'avatar-rl[{name}]'")
    for step in (1, 3):  # a run, and its resumption
        told = said(name, tmp_path, step)
        assert len(told) == 1 and told[0].startswith(f"tracker {name}: "), told
    left = list(tmp_path.glob(LEAVES[name]))
    assert left, list(tmp_path.rglob("*"))[:50]
    if name == "wandb":  # the clip goes along with the table
        assert all(b"clip.mp4" in log.read_bytes() for log in left)
    if name == "mlflow":
        [metric] = left
        assert [line.split()[-1] for line in metric.read_text().splitlines()] == list("1234")
        assert len(list(tmp_path.glob("mlruns/*/*/artifacts/samples/*/clip.mp4"))) == 2
    if name == "trackio":
        with sqlite3.connect(left[0]) as kept:
            rows = kept.execute("select run_name, step, metrics from metrics order by step")
            found = [(run, step, json.loads(text)) for run, step, text in rows]
        assert {(run, step) for run, step, _ in found} == {("run-1", step) for step in range(1, 5)}
        assert any("clip" in json.dumps(values) for *_, values in found)
