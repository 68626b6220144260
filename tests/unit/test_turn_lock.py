"""Engines and learner ranks on one device: the lock lets one side work, and a dead one's go."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avatar_rl.common.errors import ResourceError
from avatar_rl.common.turn_lock import TurnLock

HOLDER = """
import sys, time
from pathlib import Path
from avatar_rl.common.turn_lock import TurnLock
rank = int(sys.argv[2]) if len(sys.argv) > 2 else None
TurnLock(Path(sys.argv[1]), "other", rank=rank).take()
print("held", flush=True)
time.sleep(60)
"""


def holder(path: Path, rank: int | None = None) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLDER, str(path), *([] if rank is None else [str(rank)])]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(
    ("theirs", "mine", "together"),
    [(None, None, True), (0, 1, True), (0, 0, False), (None, 0, False), (1, None, False)],
)
def test_engines_share_it_ranks_share_it_and_never_both(
    tmp_path: Path, theirs: int | None, mine: int | None, together: bool
) -> None:
    path = tmp_path / "turns"
    other = holder(path, theirs)
    lock = TurnLock(path, "mine", rank=mine)
    try:
        if together:
            lock.take(patience_s=0)
        else:
            with pytest.raises(ResourceError, match=r"mine waited 0.1 s .* still works"):
                lock.take(patience_s=0.1)
            with pytest.raises(ResourceError, match="outside its turn"):
                lock.check()
        assert lock.held is together
    finally:
        other.kill()
        other.wait()
    lock.take()  # the system took the dead one's away
    lock.check()
    lock.give_back()


def test_it_is_there_as_soon_as_its_holder_is_killed_and_the_file_tells_the_turns(
    tmp_path: Path,
) -> None:
    path = tmp_path / "turns"
    other, lock = holder(path), TurnLock(path, "learner-0", rank=0)
    other.kill()
    lock.take()
    started = time.monotonic()
    lock.take()  # again: it is held already
    assert time.monotonic() - started < 1
    lock.give_back()
    lock.give_back()
    other.wait()
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["who"], row["holds"]) for row in told] == [
        ("other", True),
        ("learner-0", True),
        ("learner-0", False),
    ]
    assert told == sorted(told, key=lambda row: row["at"])
