"""The whole run as a user starts it: the command line in a process of its own, on a world of a few
clips."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from avatar_rl.cluster.services.run_buffer import open_buffer
from avatar_rl.cluster.telemetry.run_files import read_metrics, read_status
from avatar_rl.learner.model.load import load_model
from tests.small_run import MODEL, start, until_freed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a run with two rollout actors and two learner ranks."""
    folder = tmp_path_factory.mktemp("run")
    before = set(os.listdir("/dev/shm"))
    embeddings = ["--learner.embeddings.folder", str(folder / "embeddings")]
    options = ["--learner.embeddings.workers", "1", "--weights.transport", "gloo"]
    process = start(folder, *embeddings, *options)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    until_freed(before)
    [run] = (folder / "runs").iterdir()
    return run, output


def test_a_run_trains_and_says_what_came_of_it(finished: tuple[Path, str]) -> None:
    run, output = finished
    assert "tokens agree: mean" in output and "held-out accuracy" in output
    assert read_status(run).state == "finished"
    rows = [row for row in read_metrics(run) if row["step"]]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["version"] for row in rows] == [1, 2, 3]
    assert [row["replay/share"] for row in rows] == [0.0, 0.5, 0.5]  # warm after the first step
    assert all(row["kl/reference"] is not None and row["grad_norm"] is not None for row in rows)
    assert max(row["staleness/max"] for row in rows) <= 1
    # Both engines took each version from the learner itself, and none fell back to the board.
    assert "versions travel by gloo" in output
    assert [row["weights/members"] for row in rows] == [2, 2, 2]
    assert [row["weights/fallbacks"] for row in rows] == [0, 0, 0]
    # 4 prompts a step: 8 completions each while the buffer is cold, then 4
    assert rows[-1]["completions/generated"] == 4 * 8 + 2 * 4 * 4


def test_media_come_from_the_embedding_store(finished: tuple[Path, str]) -> None:
    """The towers are frozen: worker processes of the ranks encoded every prompt that was asked."""
    run, _ = finished
    rows = [row for row in read_metrics(run) if row["step"]]
    assert any(row.get("media/hidden_share") is not None for row in rows)
    assert all(row["media/store_hit_share"] is not None for row in rows)
    stored = list((run.parents[1] / "embeddings").glob("*.embedding"))
    assert len(stored) >= 2 * 4  # a layout and a video at least of each prompt
    events = (run / "events.jsonl").read_text()
    assert "embedding store off" not in events and "a media worker" not in events


def test_a_run_leaves_everything_one_looks_for(finished: tuple[Path, str]) -> None:
    run, _ = finished
    for name in (
        "config.yaml",
        "events.jsonl",
        "report.html",
        "plot.png",
        "checkpoint/model.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    sample = json.loads((run / "samples" / "step_000001.jsonl").read_text().splitlines()[0])
    assert {"format", "accuracy"} <= sample["components"].keys()


def test_saved_samples_say_what_the_loss_saw(finished: tuple[Path, str]) -> None:
    run, _ = finished
    lines = (run / "samples" / "step_000003.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["replayed"] for row in rows].count(True) == 4 * 4  # two ranks, all four groups
    for row in rows:
        count = row["tokens"]
        lists = [row[name] for name in ("token_ends", "logprobs", "log_ratio", "entropy", "weight")]
        assert [len(values) for values in lists] == [count] * 5
        assert row["token_ends"][-1] == len(row["text"])
        assert row["tier"] in ("easy", "medium", "hard") and row["baseline"] is not None
        assert row["age"] >= 0 and row["versions"][0][0] == row["version"]
        assert all(Path(item["uri"]).is_file() for item in row["media"])
        assert row["weight"][0] == pytest.approx(1.3) or count == 1  # parabolic, lambda 0.3


def test_the_exported_policy_is_not_the_one_it_started_from(finished: tuple[Path, str]) -> None:
    run, _ = finished
    trained, start_policy = (
        dict(load_model(path).named_parameters()) for path in (run / "checkpoint", MODEL)
    )
    moved = {
        name for name, tensor in trained.items() if not torch.equal(tensor, start_policy[name])
    }
    assert moved and not any(
        "visual" in name or "audio_tower" in name for name in moved
    )  # those are frozen


def test_the_ledger_is_closed_and_the_buffer_outlives_the_run(finished: tuple[Path, str]) -> None:
    with open_buffer(str(finished[0]), url=None) as buffer:
        books = buffer.stats.check_ledger()
        assert books.generated == books.trained_fresh == 12
        assert buffer.stats.read().stock == 64


def test_a_wrong_redis_password_stops_the_run_before_it_starts(
    tmp_path: Path, small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avatar_rl.buffer_service.redis.server import EmbeddedRedis

    monkeypatch.setenv("AVATAR_TEST_PASSWORD", "wrong")
    with EmbeddedRedis(tmp_path / "redis") as server:
        import redis

        redis.Redis(unix_socket_path=str(server.socket)).config_set("requirepass", "right")
        url = ("--buffer.url", server.url, "--buffer.password_env", "AVATAR_TEST_PASSWORD")
        process = start(tmp_path, *url, cache=small_cache)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "password" in output and "wrong" not in output.replace("wrong password", "")
