"""Where a cluster run's files may lie, and how they leave at the end."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.services.shared_storage import anchored, check_durable
from avatar_rl.cluster.telemetry.upload import open_target, upload
from avatar_rl.common.errors import ConfigError, ResourceError


def config(**output: object) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": "data/train.jsonl"}, "output": output})


def test_outputs_in_a_jobs_own_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(ConfigError, match=r"output.folder: runs lies in the job's own copy"):
        check_durable(config())
    with pytest.raises(ConfigError, match=r"output.cache: build/cache lies"):
        check_durable(config(folder=tmp_path))
    check_durable(config(folder=tmp_path, cache=tmp_path))


def test_workers_elsewhere_are_given_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = config(folder="runs", cache=tmp_path / "cache")
    after = anchored(before)
    assert after.output.folder == tmp_path / "runs" and after.output.cache == tmp_path / "cache"
    assert after.data.train == tmp_path / "data" / "train.jsonl" and after.data.heldout is None
    assert after.loop == before.loop


def test_a_run_folder_goes_to_any_file_system_without_the_redis_files(tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    for name in ("metrics.jsonl", "checkpoint/model.safetensors", "redis/appendonly.aof"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    assert upload(run, "memory://bucket/runs/") == "memory://bucket/runs/run-1"
    store = fsspec.filesystem("memory")
    assert store.find("/bucket/runs") == [
        "/bucket/runs/run-1/checkpoint/model.safetensors",
        "/bucket/runs/run-1/metrics.jsonl",
    ]
    assert store.cat("/bucket/runs/run-1/metrics.jsonl") == b"metrics.jsonl"


def test_an_upload_that_cannot_work_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch://x"):
        open_target("nosuch://x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("a")
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(ResourceError, match="run/a could not be written"):
        upload(tmp_path / "run", f"file://{tmp_path}/taken")
