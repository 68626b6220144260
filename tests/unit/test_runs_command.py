"""`avatar runs`, also over what a crash, a newer version or a hostile dataset left behind."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.telemetry.run_folder import RunFolder, new_run_id
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.common.text import printable

ESCAPES = "\x1b]0;owned\x07\x1b[2Jgone\x9b1m\u202eback\r"


def finished(path: Path) -> Path:
    folder = RunFolder(path)
    folder.event("group dropped", f"prompt {ESCAPES} is broken")
    folder.status(state="failed", error=f"prompt {ESCAPES}")
    folder.close()
    return path


@pytest.mark.parametrize(
    "damage", ["", '{"run_id": "b", "sta', "[]", "\xff", '{"state": "dreaming"}']
)
def test_one_damaged_status_does_not_hide_the_other_runs(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "status.json").write_text(damage, encoding="latin-1")
    assert main(["runs", "list", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("a ") and "failed" in out[1]
    assert len(out) == 3 and f"{tmp_path}/b/status.json is not a run's status" in out[2]
    assert main(["runs", "show", "b", "--folder", str(tmp_path)]) == 1
    assert "b/status.json" in capsys.readouterr().err


def test_fields_of_a_newer_version_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = finished(tmp_path / "a") / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "mood": "good"}))
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert "\na  " in capsys.readouterr().out


def test_text_of_a_dataset_cannot_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "a")
    assert main(["runs", "show", str(run)]) == 0
    screen = Screen(3)
    screen.phase("reading", ESCAPES)
    screen.event(ESCAPES)
    assert main(["runs", "show", f"{tmp_path}/{ESCAPES}"]) == 1  # an error's text
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert not set("\x1b\x07\x9b\u202e\r") & set(text)
        assert "\\x1b[2Jgone" in text


def test_what_is_no_control_is_shown_as_it_is() -> None:
    text = "Grüße, 你好, می‌خواهم, 👩‍🔬\n\tend"
    assert printable(text) == text


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path: Path) -> None:
    made: list[Path] = []

    def begin() -> None:
        folder = RunFolder(tmp_path / new_run_id("twin"))
        made.append(folder.path)
        folder.close()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
