"""The trackers themselves, offline: what is installed of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from avatar_rl.cluster.telemetry.trackers import PACKAGES

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
clip = folder / "clip.mp4"
clip.write_bytes(b"as a file, not looked into")
[one] = open_trackers([sys.argv[1]], run, metric_names="trl", tell=told.append)
for step in (1, 2):
    one.write(step, {"reward/mean": step / 10, "entropy": 1.0, "entropy/fresh": 1.0})
row = {"prompt_id": "p", "question": "q", "text": "so red", "reward": 1.0}
one.samples(2, "rollout", [{**row, "media": [{"kind": "video", "uri": str(clip)}]}, row])
for _ in range(600):  # a run takes longer than its tracker's start
    if told:
        break
    time.sleep(0.1)
one.close()
print(json.dumps(told))
"""


def said(name: str, folder: Path, **variables: str) -> list[str]:
    """What the tracker told in a process of its own, without keys and without a network."""
    keys = ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in keys}
    environment |= {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), **variables}
    done = subprocess.run(
        [sys.executable, "-c", CODE, name, str(folder)],
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
    told = said(name, tmp_path)
    assert len(told) == 1 and told[0].startswith(f"tracker {name}: "), told
    assert list(tmp_path.glob(LEAVES[name])), list(tmp_path.rglob("*"))[:50]
    if name == "wandb":  # the clip goes along with the table
        [log] = tmp_path.glob(LEAVES[name])
        assert b"clip.mp4" in log.read_bytes()
