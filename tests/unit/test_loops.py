"""What benchmarks/loop.py says of runs: when a target was met, and ratios from records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.loop import report_target, seconds_to
from benchmarks.loops.rewards import answers, even_share
from benchmarks.loops.theirs import TrlRun
from benchmarks.studies.runs import Records


def test_a_target_is_met_by_the_mean_of_a_window() -> None:
    rewards = [(1.0, 1.0), (2.0, 0.0), (3.0, 0.5), (4.0, 1.0), (5.0, 1.0)]
    assert seconds_to(rewards, 0.75, 2) == 4.0
    assert seconds_to(rewards, 1.0, 2) == 5.0
    assert seconds_to(rewards, 1.0, 3) is None
    assert seconds_to(rewards[:1], 0.5, 2) is None


def test_rewards_read_the_text() -> None:
    assert even_share("w0002w0003 and w0004, w0006") == 0.75
    assert even_share("no word") == 0.0
    assert answers("<think>x</think><answer> red</answer><answer>gold</answer>", "red") == 1.0
    assert answers("<answer>gold</answer>", "red") == answers("red", "red") == 0.0


def test_the_first_step_of_trl_is_not_counted() -> None:
    steps = [
        {"seconds": s, "cpu": 2 * s, "reward": r} for s, r in ((9.0, 0.0), (1.0, 0.5), (3.0, 1.0))
    ]
    run = TrlRun(steps, [])
    assert (run.seconds, run.core_seconds) == (2.0, 4.0)
    assert run.rewards() == [(9.0, 0.0), (10.0, 0.5), (13.0, 1.0)]


def test_only_pairs_that_met_the_target_make_a_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Records(tmp_path / "loop.jsonl")
    seconds: dict[tuple[str, int], float | None] = {
        ("trl", 0): 90.0,
        ("fresh", 0): 30.0,
        ("mixed", 0): 45.0,
        ("trl", 1): 80.0,
        ("fresh", 1): None,
        ("fresh", 2): 20.0,
    }
    for (arm, seed), value in seconds.items():
        one: dict[str, Any] = {"arm": arm, "seed": seed, "digest": "old" if seed else "now"}
        records.add(one | {"commit": "c", "seconds": value, "updates": 10})
    found = dict(report_target(records, (0, 1, 2), "now"))
    assert found["image_target_speedup"] == 3.0 == found["image_target_speedup_high"]
    assert found["image_target_speedup_mixed"] == 2.0
    assert found["image_target_reached_fresh"] == 2 and found["image_target_seeds_fresh"] == 3
    assert found["image_target_stale_records"] == 3
    assert capsys.readouterr().out.count("STALE") == 3


def test_without_records_no_ratio_is_claimed(tmp_path: Path) -> None:
    found = dict(report_target(Records(tmp_path / "none.jsonl"), (0, 1, 2), "now"))
    assert "image_target_speedup" not in found and found["image_target_seeds_trl"] == 0
