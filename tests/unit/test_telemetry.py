"""The run folder: what is written, what survives a crash and a full disk, what is refused."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from avatar_rl.cluster.telemetry import run_folder as telemetry
from avatar_rl.cluster.telemetry.metrics import (
    CATALOGUE,
    OLD_NAMES,
    catalogue_table,
    describe,
    members,
    uncatalogued,
    under_old_names,
)
from avatar_rl.cluster.telemetry.run_files import (
    MASK,
    list_runs,
    mask_secrets,
    read_metrics,
    read_status,
)
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.sinks import PrometheusSink, prometheus_name
from avatar_rl.common import files as disk
from avatar_rl.common.errors import ConfigError, DataError, ResourceError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    run = RunFolder(tmp_path / "runs" / "a", total_steps=10)
    yield run
    run.close()


class FullDisk:
    """A file that takes ``room`` bytes and then fails as a full disk does, leaving a torn
    record."""

    def __init__(self, file: object, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if len(data) > self.room:
            self.file.write(data[: self.room])  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")
        self.room -= len(data)
        return self.file.write(data)  # type: ignore[attr-defined, no-any-return]

    def fileno(self) -> int:
        return self.file.fileno()  # type: ignore[attr-defined, no-any-return]

    def close(self) -> None:
        self.file.close()  # type: ignore[attr-defined]


def scalars(run: Path) -> dict[tuple[int, str], float]:
    """TensorBoard's own reader on the folder."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = {}
    for file in sorted((run / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[event.step, value.tag] = value.simple_value
    return found


def test_metrics_round_trip_in_jsonl_and_tensorboard(folder: RunFolder) -> None:
    folder.metrics(
        1, {"reward/mean": np.float32(0.5), "grad_norm": math.nan, "lr": math.inf, "loss/kl": None}
    )
    folder.metrics(2, {"reward/mean": 0.75, "step": 99})
    rows = read_metrics(folder.path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["reward/mean"] == 0.5
    assert rows[0]["grad_norm"] is rows[0]["lr"] is rows[0]["loss/kl"] is None
    assert scalars(folder.path) == {(1, "reward/mean"): 0.5, (2, "reward/mean"): 0.75}
    with pytest.raises(TypeError, match="metric 'odd'"):
        folder.metrics(3, {"odd": [1.0]})  # type: ignore[dict-item]
    text = (folder.path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_rows_of_one_step_are_merged_in_step_order(folder: RunFolder) -> None:
    folder.metrics(2, {"reward/mean": 0.2})
    folder.metrics(0, {"eval/accuracy": 0.4})
    folder.metrics(2, {"eval/accuracy": 0.6})
    rows = read_metrics(folder.path)
    assert [(row["step"], row.get("reward/mean"), row.get("eval/accuracy")) for row in rows] == [
        (0, None, 0.4),
        (2, 0.2, 0.6),
    ]
    status = read_status(folder.path)
    assert (status.step, status.accuracy_before, status.accuracy_now, status.reward) == (
        2,
        0.4,
        0.6,
        0.2,
    )


def test_an_existing_folder_is_never_overwritten(folder: RunFolder) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.path.rglob("*"))
    with pytest.raises(ConfigError, match="not overwritten"):
        RunFolder(folder.path)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.path.rglob("*"))


def test_a_disk_without_room_refuses_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "MIN_FREE_BYTES", 1 << 62)
    with pytest.raises(ResourceError, match=r"tiny.*MiB of disk"):
        RunFolder(tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_a_parent_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ResourceError, match=r"run folder .*runs.x cannot be written"):
        RunFolder(tmp_path / "runs" / "x")


def test_full_disk_warns_once_then_saves_what_waited(tmp_path: Path) -> None:
    warnings: list[str] = []
    run = RunFolder(tmp_path / "a", on_warning=warnings.append)
    run.metrics(1, {"reward/mean": 0.1})
    real = run._metrics._file
    run._metrics._file = FullDisk(real, room=20)  # type: ignore[assignment]
    for step in (2, 3, 4):
        run.metrics(step, {"reward/mean": step / 10})
    assert len(warnings) == 1 and str(run.path) in warnings[0] and "No space left" in warnings[0]
    assert [row["step"] for row in read_metrics(run.path)] == [1]  # no torn record stays behind
    run._metrics._file = real
    run.metrics(5, {"reward/mean": 0.5})
    assert [row["reward/mean"] for row in read_metrics(run.path)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert len(warnings) == 2 and "can be written again" in warnings[1]
    run.close()
    assert len(warnings) == 2


def test_a_disk_that_takes_some_files_only_does_not_warn_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    run = RunFolder(tmp_path / "a", on_warning=warnings.append)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(telemetry, "replace_text", full)
        for step in (1, 2, 3):
            run.metrics(step, {"lr": 1.0})
    assert len(warnings) == 1
    run.metrics(4, {"lr": 1.0})
    assert len(warnings) == 2 and read_status(run.path).step == 4
    run.close()


def test_what_never_fitted_is_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "MAX_PENDING", 2)
    warnings: list[str] = []
    run = RunFolder(tmp_path / "a", on_warning=warnings.append)
    run._events._file = FullDisk(run._events._file, room=0)  # type: ignore[assignment]
    for index in range(5):
        run.event("actor died", f"number {index}")
    run.close()
    assert "'events.jsonl': 5" in warnings[-1]


def test_a_torn_last_line_is_left_out_and_damage_elsewhere_is_not(folder: RunFolder) -> None:
    folder.metrics(1, {"lr": 1.0})
    file = folder.path / "metrics.jsonl"
    good = file.read_bytes()
    file.write_bytes(good + b'{"step": 2, "lr"')
    assert [row["step"] for row in read_metrics(folder.path)] == [1]
    file.write_bytes(b"{broken\n" + good)
    with pytest.raises(DataError, match="line 1"):
        read_metrics(folder.path)
    file.write_bytes(b'{"lr": 1}\n')
    with pytest.raises(DataError, match="without an integer 'step'"):
        read_metrics(folder.path)


def test_resume_sets_later_steps_aside(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.metrics(0, {"eval/accuracy": 0.4})
    for step in (1, 2, 3):
        run.metrics(step, {"lr": float(step)})
    run.close()
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4')
    again = RunFolder(run.path, resume_step=2)
    again.metrics(3, {"lr": 30.0})
    again.close()
    assert [(row["step"], row.get("lr")) for row in read_metrics(run.path)] == [
        (0, None),
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    assert json.loads((run.path / "metrics.abandoned.jsonl").read_text())["lr"] == 3.0
    assert read_status(run.path).accuracy_before == 0.4
    with pytest.raises(DataError, match=r"status\.json"):
        RunFolder(tmp_path / "nothing", resume_step=2)


def test_secrets_are_masked_and_names_of_variables_are_not(folder: RunFolder) -> None:
    folder.config(
        {
            "buffer": {
                "url": "rediss://user:hunter2@host:6379/0",
                "password": "hunter2",
                "password_env": "REDIS_PW",
            },
            "judge": {
                "api_key": "hunter2",
                "api_key_env": "OPENAI_API_KEY",
                "max_tokens": 256,
                "token": "",
            },
            "list": [{"hf_token": "hunter2"}],
        }
    )
    text = (folder.path / "config.yaml").read_text()
    assert "hunter2" not in text
    config = yaml.safe_load(text)
    assert config["buffer"] == {
        "url": f"rediss://user:{MASK}@host:6379/0",
        "password": MASK,
        "password_env": "REDIS_PW",
    }
    assert config["judge"] == {
        "api_key": MASK,
        "api_key_env": "OPENAI_API_KEY",
        "max_tokens": 256,
        "token": "",
    }
    assert mask_secrets("redis://:hunter2@h") == f"redis://:{MASK}@h"


def test_samples_keep_every_component(folder: RunFolder) -> None:
    rows = [
        {
            "prompt_id": "p",
            "question": "Which?",
            "answer": "red",
            "text": "<think>x</think>\nred",
            "reward": 0.25,
            "components": {"format": -1.0, "judge": None, "odd": math.nan},
            "version": 3,
        },
    ]
    path = folder.samples(10, rows)
    assert path.name == "step_000010.jsonl"
    assert json.loads(path.read_text())["components"] == {
        "format": -1.0,
        "judge": None,
        "odd": None,
    }
    page = path.with_suffix(".md").read_text()
    for piece in (
        "## p",
        "Which?",
        "**red**",
        "    <think>x</think>",
        "reward 0.25",
        "format -1",
        "judge masked",
        "version 3",
    ):
        assert piece in page
    assert folder.samples(0, [], kind="eval").name == "eval_000000.jsonl"


def test_events_from_many_threads_stay_whole(folder: RunFolder) -> None:
    def many(name: int) -> None:
        for index in range(50):
            folder.event("test", f"{name}/{index}", worker=name)

    threads = [threading.Thread(target=many, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = list(disk.read_jsonl(folder.path / "events.jsonl"))
    assert {row["message"] for row in rows} == {
        f"{name}/{index}" for name in range(4) for index in range(50)
    }
    assert len(rows) == 200


def test_status_tells_a_lost_run_from_a_living_one(folder: RunFolder) -> None:
    folder.status(state="training", phase="training")
    status = read_status(folder.path)
    assert (status.pid, status.host, status.lost) == (os.getpid(), socket.gethostname(), False)
    assert status.model_copy(update={"pid": 2**22 + 1}).lost
    assert status.model_copy(
        update={"started": 0.0}
    ).lost  # the process id belongs to a later process
    assert not status.model_copy(update={"pid": 2**22 + 1, "state": "finished"}).lost
    assert [run.run_id for run in list_runs(folder.path.parent)] == ["a"]
    with pytest.raises(ValueError, match="state"):
        folder.status(state="dancing")


def test_prometheus_scrapes_one_gauge_per_metric_from_loopback(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = RunFolder(tmp_path / "a", sinks=[PrometheusSink("a", port)])
    with pytest.raises(ResourceError, match=f"prometheus_port {port} on 127.0.0.1"):
        PrometheusSink("b", port)
    run.metrics(1, {"reward/mean": 0.5, "lr": math.nan})
    run.metrics(2, {"reward/mean": 0.6})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    run.close()
    assert [line for line in lines if not line.startswith("#")] == [
        'avatar_step{run="a"} 2.0',
        'avatar_reward_mean{run="a"} 0.6',
    ]
    assert prometheus_name("eval/accuracy/count beeps") == "avatar_eval_accuracy_count_beeps"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


def test_catalogue_finds_members_of_families() -> None:
    assert describe("reward/mean").unit == "" and describe("reward/mean").name == "reward/mean"  # type: ignore[union-attr]
    assert describe("reward/judge").name == "reward/<component>"  # type: ignore[union-attr]
    assert describe("eval/accuracy/colour").name == "eval/accuracy/<category>"  # type: ignore[union-attr]
    assert describe("eval/accuracy/") is None
    assert uncatalogued(["lr", "mine/x", "eval/needs/audio"]) == ["mine/x"]
    assert members("reward/<component>", ["reward/std", "reward/b", "reward/a"]) == {
        "a": "reward/a",
        "b": "reward/b",
    }
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)


def test_old_metric_names_are_written_beside_todays() -> None:
    found = under_old_names({"time/replicate": 0.25, "lr": 1.0})
    assert found == {"time/hold": 0.25}
    assert under_old_names({"lr": 1.0}) == {}
    assert uncatalogued(found) == []
    assert not OLD_NAMES.keys() & {metric.name for metric in CATALOGUE}


def test_docs_hold_the_catalogue() -> None:
    page = (Path(__file__).parents[2] / "docs" / "output.md").read_text()
    assert catalogue_table() in page, (
        "docs/output.md is behind cluster/metrics.py: paste catalogue_table() into it"
    )
