"""Trackers run beside the run: their thread, their failures, their names for our metrics."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from avatar_rl.cluster.config import OutputConfig, RunConfig
from avatar_rl.cluster.telemetry import trackers
from avatar_rl.cluster.telemetry.metric_names import NAMES, aliases, table
from avatar_rl.cluster.telemetry.metrics import CATALOGUE
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.trackers import Tracked, Tracker, flat, open_trackers

ROOT = Path(__file__).parents[2]
RUN = Tracked("run-1", "toy", Path("runs/run-1"), {"loop": {"steps": 3}}, "abc")


class Kept:
    """A backend that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.tables: list[tuple[int, str, list[Mapping[str, Any]]]] = []
        self.finished = False
        self.fails_at = -1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise OSError("network is unreachable\nand much more")
        self.rows.append((step, dict(values)))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tables.append((step, name, list(rows)))

    def finish(self) -> None:
        self.finished = True


def tracker(kept: Kept, told: list[str], names: str = "ours") -> Tracker:
    return Tracker(
        "toy", lambda run: (kept, f"at {run.project}"), RUN, names=names, tell=told.append
    )


def test_a_tracker_gets_metrics_samples_and_the_end(tmp_path: Path) -> None:
    kept, told = Kept(), list[str]()
    folder = RunFolder(tmp_path / "run")
    folder.send_to([tracker(kept, told, "trl")])
    folder.metrics(1, {"reward/mean": 0.5, "loss/total": float("nan")})
    folder.samples(1, [{"prompt_id": "p", "text": "so red", "reward": 1.0, "secret": 3}])
    folder.close()
    assert kept.rows == [(1, {"reward/mean": 0.5, "reward": 0.5})]  # null is not sent
    [(step, name, [row])] = kept.tables
    assert (step, name, row["text"]) == (1, "rollout", "so red") and "secret" not in row
    assert kept.finished and told == ["tracker toy: at toy"]


def test_clips_are_sent_only_where_they_may_be(tmp_path: Path) -> None:
    small, large = tmp_path / "a.mp4", tmp_path / "b.mp4"
    small.write_bytes(b"x")
    with large.open("wb") as file:
        file.truncate(trackers.MOST_CLIP_BYTES + 1)
    media = [{"kind": "video", "uri": f"{large}"}, {"kind": "video", "uri": f"file://{small}"}]
    for allowed in (False, True):
        kept, run = Kept(), replace(RUN, media=allowed)
        begin = partial(lambda kept, run: (kept, ""), kept)
        one = Tracker("toy", begin, run, names="ours", tell=lambda _: None)
        rows = [{"prompt_id": "p", "media": media}, {"media": [{"uri": "/gone.mp4"}]}, {}]
        one.samples(1, "rollout", rows)
        one.close()
        [(_, _, told)] = kept.tables
        assert [row["media"] for row in told] == ["b.mp4, a.mp4", "gone.mp4", ""]
        clip = trackers.Clip("video", small)
        assert [row["clip"] for row in told] == [clip if allowed else None, None, None]


def test_one_that_fails_costs_one_sentence_and_no_time(tmp_path: Path) -> None:
    kept, told = Kept(), list[str]()
    kept.fails_at = 2
    folder = RunFolder(tmp_path / "run")
    folder.send_to([tracker(kept, told)])
    for step in range(1, 200):
        folder.metrics(step, {"reward/mean": 0.5})
    folder.close()
    assert [step for step, _ in kept.rows] == [1]
    assert told[1:] == ["tracker toy is left out: network is unreachable; the run goes on"]


def test_one_that_cannot_begin_is_left_out() -> None:
    told: list[str] = []

    def begin(run: Tracked) -> tuple[Kept, str]:
        raise SystemExit("no key")

    broken = Tracker("toy", begin, RUN, names="ours", tell=told.append)
    broken.write(1, {"reward/mean": 0.5})
    broken.close()
    assert told == ["tracker toy is left out: no key; the run goes on"]


def test_one_that_hangs_does_not_hold_the_run_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "LATE_S", 0.1)
    told, never = list[str](), threading.Event()

    def begin(run: Tracked) -> tuple[Kept, str]:
        never.wait(30)
        return Kept(), ""

    slow = Tracker("toy", begin, RUN, names="ours", tell=told.append)
    for step in range(trackers.MOST + 10):  # the oldest go first
        slow.write(step, {"reward/mean": 0.5})
    slow.close()
    never.set()
    assert told == [
        "tracker toy is left out: it has not answered at all by the end of the run; the run goes on"
    ]


def test_a_package_that_is_not_installed_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    told: list[str] = []
    names = ("tensorboard", "wandb", "swanlab")
    assert open_trackers(names, RUN, metric_names="ours", tell=told.append) == []
    assert len(told) == 2 and "pip install 'avatar-rl[wandb]'" in told[0]


def test_every_tracker_of_a_recipe_is_known() -> None:
    options = {*trackers.BEGIN, "tensorboard"}
    assert set(OutputConfig(trackers=tuple(options)).trackers) == options
    assert trackers.BEGIN.keys() == trackers.PACKAGES.keys()
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in text for name in trackers.PACKAGES)


def test_what_a_tracker_is_told_of_the_run(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"data": {"train": "x"}, "buffer": {"url": "redis://me:hush@host:1"}}
    )
    told = Tracked.of(config, tmp_path / "run-7")
    assert told.run_id == "run-7" and told.project == "avatar-rl"
    assert "hush" not in str(told.config)
    assert flat(told.config)["loop.steps"] == 100


# -- names -----------------------------------------------------------------------------------------


def test_names_of_other_frameworks() -> None:
    metrics = {
        "reward/mean": 0.5,
        "reward/format": 0.25,
        "reward_std/format": 0.125,
        "entropy": 1.0,
        "entropy/fresh": 2.0,
        "mine": 3.0,
    }
    assert aliases(metrics, "ours") == {}
    assert aliases(metrics, "trl") == {
        "reward": 0.5,
        "rewards/format/mean": 0.25,
        "rewards/format/std": 0.125,
        "entropy": 1.0,
    }
    assert aliases(metrics, "verl") == {"critic/rewards/mean": 0.5, "actor/entropy": 1.0}


def test_every_name_on_our_side_is_in_the_catalogue() -> None:
    assert NAMES.keys() <= {metric.name for metric in CATALOGUE}
    for column in (0, 1):
        theirs = [pair[column] for pair in NAMES.values() if pair[column]]
        assert len(set(theirs)) == len(theirs)


def test_the_page_has_the_table_of_names() -> None:
    assert table() in (ROOT / "docs" / "output.md").read_text()
