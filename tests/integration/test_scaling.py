"""A run under way grows from one rollout actor to three and back to one; interrupted then, it
leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from avatar_rl.cluster.commands.scale import scale
from avatar_rl.cluster.services.run_buffer import open_buffer
from avatar_rl.cluster.telemetry.run_files import read_metrics
from avatar_rl.common.errors import ConfigError
from tests.small_run import assert_ended_in_order, start

DEADLINE_S = 200.0
LIGHT = (
    "--loop.steps",
    "100000",
    "--cold_start",
    "null",
    "--learner.ranks",
    "1",
    "--output.export",
    "false",
    "--resources.rollout_cpus",
    "0.5",
    "--evaluation.every",
    "0",
    "--rollout.workers",
    "1",
    "--rollout.max_workers",
    "3",
    "--rollout.drain_s",
    "20",
)


def sizes(run: Path) -> list[float]:
    """Rollout actors at work after each step so far."""
    return [
        row["rollout/workers"] or 0
        for row in read_metrics(run)
        if row.get("rollout/workers") is not None
    ]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_a_pool_grows_and_shrinks_under_load_and_loses_no_group(
    tmp_path: Path, small_cache: Path
) -> None:
    before = set(os.listdir("/dev/shm"))
    process = start(tmp_path, *LIGHT, cache=small_cache)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if " step " in line:
                break
        [run] = (tmp_path / "runs").iterdir()
        with pytest.raises(ConfigError, match="allows 1 to 3 rollout workers, not 4"):
            scale(run, 4)
        until(
            lambda: sizes(run)[-1:] == [1], "a pool of one"
        )  # its row may come after the line on the screen
        assert scale(run, 3).endswith("1 -> 3 desired")
        until(lambda: sizes(run)[-1] == 3, "a pool of three")
        steps = len(sizes(run))
        until(lambda: len(sizes(run)) > steps + 4, "steps with three actors")
        assert scale(run, 1).endswith("3 -> 1 desired")
        until(lambda: sizes(run)[-1] == 1, "a pool of one")
        steps = len(sizes(run))
        until(lambda: len(sizes(run)) > steps + 2, "steps with one actor again")
    finally:
        process.send_signal(signal.SIGINT)  # test_survival asks with SIGTERM
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, "".join(said) + output
    assert_ended_in_order(process, run, before)
    assert (run / "report.html").is_file()
    with pytest.raises(ConfigError, match="is interrupted: only a run under way can be scaled"):
        scale(run, 2)

    rows = [row for row in read_metrics(run) if row["step"]]
    assert {row["groups/fresh"] for row in rows} == {4}  # no step went short
    events = (run / "events.jsonl").read_text()
    assert events.count('"rollout actor left"') == 2 and events.count("drained") == 2
    assert "rollout actor died" not in events
    with open_buffer(str(run), url=None) as buffer:
        books = (
            buffer.stats.check_ledger()
        )  # raises unless generated = trained + replay only + dropped + in flight
        assert books.trained_fresh == 4 * buffer.replay.version() and books.duplicates == 0
        assert sum(books.dropped.values()) == books.replay_only == 0
        stats = buffer.stats.read()
        assert stats.leased == 0 and stats.counters.get("leases_expired", 0) == 0


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_an_actor_that_does_not_drain_in_time_is_killed_and_its_prompts_are_asked_again(
    tmp_path: Path, small_cache: Path
) -> None:
    process = start(
        tmp_path, *LIGHT, "--rollout.workers", "2", "--rollout.drain_s", "2", cache=small_cache
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"step +2/", line):
                break
        [run] = (tmp_path / "runs").iterdir()
        with open_buffer(str(run), url=None, under_way=True) as buffer:
            fact = buffer.control.get_value("rollout/rollout-1")
        assert fact is not None
        stuck = psutil.Process(int(fact["pid"]))
        stuck.suspend()
        assert scale(run, 1).endswith("2 -> 1 desired")
        until(
            lambda: "rollout-1 was killed" in (run / "events.jsonl").read_text(),
            "the end of an actor that hangs",
        )
        until(
            lambda: not stuck.is_running() or stuck.status() == psutil.STATUS_ZOMBIE,
            "the end of its process",
        )
        steps = len(sizes(run))
        until(lambda: len(sizes(run)) > steps + 2, "steps with one actor")
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    with open_buffer(str(run), url=None) as buffer:
        books = buffer.stats.check_ledger()
        assert books.trained_fresh == 4 * buffer.replay.version() and books.duplicates == 0
        assert sum(books.dropped.values()) == books.replay_only == 0
