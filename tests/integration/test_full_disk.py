"""A whole run whose disk is full for a while: it says so, continues, and loses nothing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from avatar_rl.cluster.services.run_buffer import open_buffer
from avatar_rl.cluster.telemetry.run_files import list_runs, read_metrics, read_status
from avatar_rl.common.files import read_jsonl
from tests.small_run import left_over, start

STEPS = 16
FULL_S = 12.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for the run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    with suppress(OSError), file.open("ab") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()


def test_a_run_on_a_full_disk_pauses_continues_and_ends_whole(disk: Path, tmp_path: Path) -> None:
    """Another program takes all that is free, and more whenever there is some, then ends."""
    process = start(
        disk,
        *("--loop.steps", str(STEPS), "--checkpoint.every", "2", "--rollout.workers", "1"),
        *("--learner.ranks", "1", "--evaluation.every", "0"),
        cache=tmp_path / "cache",
    )
    filler = disk / "another-program"
    try:
        deadline = time.monotonic() + 200
        while not (runs := list_runs(disk / "runs")) or runs[0].step < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        run = disk / "runs" / runs[0].run_id
        until = time.monotonic() + FULL_S
        while time.monotonic() < until:
            fill(filler)
            time.sleep(0.2)
        during = read_status(run).step
        assert process.poll() is None and during < STEPS
        filler.unlink()
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, output
    said = [row["kind"] for row in read_jsonl(run / "events.jsonl")]
    assert "run paused" in output and "run continues" in output, output
    assert read_status(run).state == "finished" and "ledger closed" in said
    assert [row["step"] for row in read_metrics(run)] == list(
        range(STEPS + 1)
    )  # 0: before the first
    with open_buffer(str(run), url=None) as buffer:
        books = buffer.stats.check_ledger()
    assert books.gap == 0 and books.trained_fresh == STEPS * 4
    assert (run / "checkpoint" / "model.safetensors").is_file()
    assert left_over(process.pid) == []
