"""`avatar buffer ...` through the command line: against a server by URL, and against a run
folder."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
import redis
import yaml

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.errors import BufferSetupError
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.cli import main
from avatar_rl.cluster.telemetry.run_files import RunStatus
from avatar_rl.cluster.training.replay_import import carry_over
from tests.buffer_records import make_group

CONFIG = BufferConfig(capacity=60, warm_up=0, appendfsync="always")  # not the default settings


def fill(buffer: ReplayBuffer) -> None:
    token = buffer.replay.new_fencing_token()
    buffer.requests.push([RolloutRequest(seq=s, prompt_id=f"p{s}", step=0, n=4) for s in range(3)])
    for lease in buffer.requests.lease("a", 3):
        buffer.requests.add_group(make_group(lease, [0.0, 1.0]), lease, tokens_generated=12)
    buffer.replay.commit_step(0, 1, [f"{s:08d}" for s in range(3)], token)


@pytest.fixture
def url(server: EmbeddedRedis) -> str:
    """A server with run "run", of settings that are not the default ones."""
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(CONFIG, "run", server.url) as buffer:
        fill(buffer)
    return server.url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder as a finished run with an embedded buffer leaves it."""
    run = tmp_path / "runs" / "toy-1"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"buffer": CONFIG.model_dump(mode="json")}))
    with (
        EmbeddedRedis(run / "redis", appendfsync="always") as server,
        ReplayBuffer.connect(CONFIG, "toy-1", server.url) as buffer,
    ):
        fill(buffer)
    return run


@pytest.fixture
def served(tmp_path: Path, url: str) -> Path:
    """The folder of a run whose buffer is at a URL, as on a cluster."""
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    settings = CONFIG.model_copy(update={"url": url}).model_dump(mode="json")
    (run / "config.yaml").write_text(yaml.safe_dump({"buffer": settings}))
    return run


def test_a_run_folder_leads_to_the_server_that_its_recipe_names(
    served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["buffer", "inspect", str(served)]) == 0
    assert "6 trajectories, 3 successes" in capsys.readouterr().out
    out = served.parent / "into-next.jsonl"
    carried = carry_over(
        served, out, prompt_ids={"p0", "p1"}, weights={"accuracy": 1.0}, login=open_config(served)
    )
    assert carried == len(out.read_text().splitlines()) > 0


def test_what_changes_a_served_buffer_waits_for_its_run_to_end(
    served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = RunLock(served, on_warning=print)
    lock.acquire()
    assert main(["buffer", "inspect", str(served)]) == 0
    assert main(["buffer", "clear", str(served)]) == 1
    assert "is under way" in capsys.readouterr().err
    lock.release()
    assert main(["buffer", "clear", str(served)]) == 0


def test_a_buffer_is_found_where_its_run_had_it_though_the_recipe_has_changed(
    served: Path, folder: Path
) -> None:
    """The next stage's recipe: no URL any more, or one of a server that has no such run; or one at
    last."""
    for run, login in (
        (served, CONFIG),
        (
            served,
            open_config(served).model_copy(
                update={"url": "redis://127.0.0.1:9", "reconnect_s": 0.1}
            ),
        ),
        (folder, CONFIG.model_copy(update={"url": "redis://127.0.0.1:9"})),
    ):
        out = run.parent / "into-next.jsonl"
        assert (
            carry_over(run, out, prompt_ids={"p0", "p1"}, weights={"accuracy": 1.0}, login=login)
            > 0
        )


def open_config(run: Path) -> BufferConfig:
    return BufferConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text())["buffer"])


def test_inspect_by_url_shows_a_run_whatever_its_settings(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["buffer", "inspect", "run", "--url", url]) == 0
    said = capsys.readouterr().out
    for line in (
        "replay buffer of run",
        "1 (step 0 committed)",
        "6 trajectories, 3 successes",
        "3 generated = 3 trained",
    ):
        assert line in said


def test_inspect_does_not_make_a_run_of_a_typing_error(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = redis.Redis.from_url(url).keys("*")
    assert main(["buffer", "inspect", "rnu", "--url", url]) == 1
    assert "has no run rnu" in capsys.readouterr().err
    assert redis.Redis.from_url(url).keys("*") == before


def test_inspect_says_when_the_books_do_not_close(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    redis.Redis.from_url(url).hincrby("avatar:{run}:ledger", "generated", 1)
    assert main(["buffer", "inspect", "run", "--url", url]) == 1
    assert "1 groups unaccounted for" in capsys.readouterr().err


def test_export_and_import_by_url(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stock.jsonl"
    assert main(["buffer", "export", "run", str(out), "--url", url]) == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()][:2] == [
        "00000000.0",
        "00000000.1",
    ]
    assert main(["buffer", "import", "new", str(out), "--url", url, "--first-seq", "700"]) == 0
    assert "6 trajectories in 3 groups added, 0 groups known before" in capsys.readouterr().out
    with ReplayBuffer.attach(CONFIG, "new", url) as buffer:
        assert buffer.stats.read().stock == 6 and buffer.stats.check_ledger().replay_only == 3


def test_snapshot_clear_and_import_of_a_run_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = folder.parent / "cut.avsnap"
    assert main(["buffer", "snapshot", str(folder), str(cut)]) == 0
    assert main(["buffer", "clear", str(folder)]) == 0
    assert main(["buffer", "inspect", str(folder)]) == 0
    assert "0 trajectories, 0 successes" in capsys.readouterr().out
    assert main(["buffer", "import", str(folder), str(cut), "--first-seq", "1"]) == 1
    assert "--first-seq numbers a .jsonl or .parquet export" in capsys.readouterr().err
    assert main(["buffer", "import", str(folder), str(cut)]) == 0
    assert "6 trajectories of 3 prompts restored, version 1" in capsys.readouterr().out
    assert main(["buffer", "export", str(folder), str(folder / "stock.parquet")]) == 0
    assert "6 trajectories written" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["buffer", "inspect", str(tmp_path)]) == 1
    assert "is not a run folder: give one of `avatar runs`" in capsys.readouterr().err


def test_a_run_that_goes_on_is_not_opened_twice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedRedis(folder / "redis") as server:
        assert main(["buffer", "inspect", str(folder)]) == 1
        said = capsys.readouterr().err
        assert "is in use by another redis-server" in said and server.url in said
        assert (
            main(["buffer", "inspect", "toy-1", "--url", server.url]) == 0
        )  # as the message tells
        with pytest.raises(BufferSetupError, match="in use"):
            EmbeddedRedis(folder / "redis", start_s=0.1).start()
    assert main(["buffer", "inspect", str(folder)]) == 0  # the lock goes with the server


def test_a_run_under_way_is_looked_at_where_it_is_and_not_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    status = RunStatus(
        run_id="toy-1", started=now, updated=now, host=socket.gethostname(), pid=os.getpid()
    )
    (folder / "status.json").write_text(status.model_dump_json())
    with EmbeddedRedis(folder / "redis"):
        assert main(["buffer", "inspect", str(folder)]) == 0
        assert "6 trajectories, 3 successes" in capsys.readouterr().out
        assert main(["buffer", "snapshot", str(folder), str(folder / "it.snap")]) == 0
        for command in (["clear", str(folder)], ["import", str(folder), str(folder / "it.snap")]):
            assert main(["buffer", *command]) == 1
            assert "is in use by another redis-server" in capsys.readouterr().err
    (folder / "status.json").write_text(
        status.model_copy(update={"state": "finished"}).model_dump_json()
    )
    assert main(["buffer", "inspect", str(folder)]) == 0  # from its append-only file


def test_a_crashed_server_frees_its_folder(folder: Path) -> None:
    server = EmbeddedRedis(folder / "redis").start()
    server.kill()
    server.start()
    assert redis.Redis.from_url(server.url).ping()
    server.stop()


def test_a_password_comes_from_the_environment(
    server: EmbeddedRedis,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = redis.Redis.from_url(url)
    client.config_set("requirepass", "s3cret")
    try:
        monkeypatch.setenv("RIGHT", "s3cret")
        monkeypatch.setenv("WRONG", "oops")
        assert main(["buffer", "inspect", "run", "--url", url, "--password-env", "RIGHT"]) == 0
        assert main(["buffer", "inspect", "run", "--url", url, "--password-env", "WRONG"]) == 1
        assert "check username, password and ACL" in capsys.readouterr().err
    finally:
        redis.Redis.from_url(url, password="s3cret").config_set("requirepass", "")
