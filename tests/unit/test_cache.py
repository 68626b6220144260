"""Two runs that start at the same time with one cache make each thing once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from avatar_rl.cluster.recipe.assets import made_once


def no_wait(why: str) -> None:
    pytest.fail(why)


def test_what_is_there_is_not_made(tmp_path: Path) -> None:
    with made_once(tmp_path, no_wait) as missing:
        assert not missing


def test_a_second_run_waits_for_the_first_and_finds_what_it_made(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "world"
    waits, wanted = threading.Event(), []

    def second() -> None:
        with made_once(folder, lambda why: waits.set()) as missing:
            wanted.append(missing)

    other = threading.Thread(target=second)
    with made_once(folder, no_wait) as missing:
        assert missing
        other.start()
        assert waits.wait(10) and wanted == []
        folder.mkdir()
    other.join(10)
    assert wanted == [False]


def test_whoever_waits_takes_over_from_one_that_failed(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    waits, wanted = threading.Event(), []

    def second() -> None:
        with made_once(folder, lambda why: waits.set()) as missing:
            wanted.append(missing)

    other = threading.Thread(target=second)
    with pytest.raises(RuntimeError), made_once(folder, no_wait):
        other.start()
        assert waits.wait(10)
        raise RuntimeError("disk full")
    other.join(10)
    assert wanted == [True]
