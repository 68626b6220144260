"""Workers' logs by role, written on while they run: from files as Ray makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatar_rl.cluster.services.log_mirror import LogMirror
from avatar_rl.common.process import ROLE_MARK, name_log


@pytest.fixture
def ray_logs(tmp_path: Path) -> Path:
    folder = tmp_path / "session" / "logs"
    folder.mkdir(parents=True)
    return folder


def worker(folder: Path, pid: int, text: str, suffix: str = "out", job: str = "01000000") -> None:
    for kind in ("out", "err"):  # Ray makes both at once
        file = folder / f"worker-{'ab' * 4}-{job}-{pid}.{kind}"
        with file.open("a") as stream:
            stream.write(text if kind == suffix else "")


def written(out: Path) -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted(out.glob("*"))}


def test_each_role_has_a_file_that_grows(ray_logs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run" / "logs"
    mirror = LogMirror(ray_logs, "*", out)
    worker(ray_logs, 7, ":job_id:01000000\n")
    mirror.look()
    assert not out.exists()  # nothing was said
    worker(ray_logs, 7, f":actor_name:RolloutActor\n{ROLE_MARK}rollout-0\nloading\nhalf a li")
    mirror.look()
    assert written(out) == {"rollout-0": "--- process 7\nloading\n"}
    worker(ray_logs, 7, "ne\n")
    worker(ray_logs, 7, "Traceback: what went wrong\n", "err")
    mirror.look()
    assert written(out)["rollout-0"] == (
        "--- process 7\nloading\nhalf a line\nTraceback: what went wrong\n"
    )
    worker(ray_logs, 9, f":job_id:01000000\n{ROLE_MARK}rollout-0\nits successor\n")
    mirror.look()
    assert written(out)["rollout-0"].endswith("wrong\n--- process 9\nits successor\n")


def test_classes_that_do_not_say_their_role_are_numbered(ray_logs: Path, tmp_path: Path) -> None:
    mirror = LogMirror(ray_logs, "*", tmp_path / "logs")
    for pid, kind in ((3, "RewardActor"), (4, "RewardActor"), (5, "WeightStore")):
        worker(ray_logs, pid, f":job_id:01000000\n:actor_name:{kind}\nsaid by {pid}\n")
    mirror.look()
    assert written(tmp_path / "logs") == {
        "reward": "--- process 3\nsaid by 3\n",
        "reward-1": "--- process 4\nsaid by 4\n",
        "weights": "--- process 5\nsaid by 5\n",
    }


def test_the_end_is_read_whole_also_of_who_never_said_a_role(
    ray_logs: Path, tmp_path: Path
) -> None:
    with LogMirror(ray_logs, "*", tmp_path / "logs") as mirror:
        worker(ray_logs, 3, ":job_id:01000000\nImportError: no such file", "err")
        worker(ray_logs, 4, f"{ROLE_MARK}learner-0\nlast words")
    mirror.stop()  # a second time
    assert written(tmp_path / "logs") == {
        "workers": "--- process 3\nImportError: no such file\n",
        "learner-0": "--- process 4\nlast words\n",
    }


def test_other_jobs_of_a_clusters_node_are_left_out(ray_logs: Path, tmp_path: Path) -> None:
    mirror = LogMirror(ray_logs, "*-02000000-*", tmp_path / "logs")
    worker(ray_logs, 3, f"{ROLE_MARK}learner-0\nold\n", job="01000000")
    worker(ray_logs, 4, f"{ROLE_MARK}learner-0\nours\n", job="02000000")
    mirror.look(last=True)
    assert written(tmp_path / "logs") == {"learner-0": "--- process 4\nours\n"}


def test_a_full_disk_is_told_once_and_ends_nothing(
    ray_logs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("in the way")
    mirror = LogMirror(ray_logs, "*", tmp_path / "logs")
    for text in ("one\n", "two\n"):
        worker(ray_logs, 4, f"{ROLE_MARK}learner-0\n{text}")
        mirror.look()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_worker_names_both_its_logs(capsys: pytest.CaptureFixture[str]) -> None:
    name_log("rollout-3")
    said = capsys.readouterr()
    assert said.out == said.err == ":avatar_role:rollout-3\n"
