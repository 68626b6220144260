"""Crashes of Redis and of its parent; snapshots and restores."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import redis

from avatar_rl.buffer_service.errors import (
    BufferSetupError,
    FencedError,
    RecordError,
)
from avatar_rl.buffer_service.records.codec import decode
from avatar_rl.buffer_service.redis.server import EmbeddedRedis, find_redis_server
from avatar_rl.buffer_service.store import ReplayBuffer
from tests.buffer_records import CONFIG, make_group, namespace, requests, run_step

OLD_SNAPSHOT = Path(__file__).parents[1] / "data" / "buffer-of-release-0.1.snap"

# -- durability


def test_kill_9_of_redis_loses_nothing_acknowledged(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "aof", appendfsync="always") as server:
        buffer = ReplayBuffer.connect(CONFIG, "run", server.url)
        token = buffer.replay.new_fencing_token()
        run_step(buffer, 0, token)
        buffer.requests.push(requests(1, 40, first=100))
        leases = buffer.requests.lease("a", 40)
        acknowledged: list[str] = []

        def write() -> None:
            for lease in leases:
                group = make_group(lease, [0.0, 1.0], tokens=300)
                if buffer.requests.add_group(group, lease, tokens_generated=600).status in (
                    "fresh",
                    "duplicate",
                ):
                    acknowledged.append(group.id)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(3):
            time.sleep(0.03)
            server.kill()
            known = list(acknowledged)
            server.start()
            stored = redis.Redis.from_url(server.url).zrange(buffer._connection.key("fresh"), 0, -1)
            assert set(known) <= {gid.decode() for gid in stored}
        writer.join()
        share = buffer.replay.lease_fresh("learner", 1, fencing_token=token)
        assert [g.id for g in share.groups] == sorted(acknowledged) and len(acknowledged) == 40
        assert buffer.stats.check_ledger().generated == 42 and buffer.replay.version() == 1
        buffer.close()


def test_embedded_redis_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys,time; from pathlib import Path\n"
        "from avatar_rl.buffer_service.redis.server import EmbeddedRedis\n"
        "s = EmbeddedRedis(Path(sys.argv[1])).start(); print(s.pid, s.url, flush=True); "
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().split()
    assert redis.Redis.from_url(url).ping()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while (
        Path(f"/proc/{pid}").exists()
        and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    ):
        assert time.monotonic() < deadline, "redis-server outlived its parent"
        time.sleep(0.02)


def test_stop_is_clean_and_the_socket_folder_goes(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path).start()
    pid, socket = server.pid, server.socket
    server.stop()
    assert server.pid is None and pid is not None and not socket.parent.exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"not an append-only file")
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense")
    server = EmbeddedRedis(tmp_path, start_s=10)
    with pytest.raises(BufferSetupError, match=r"redis-server stopped at once: .*redis\.log"):
        server.start()
    server.stop()


def test_a_redis_server_is_found() -> None:
    said = subprocess.run([find_redis_server(), "--version"], capture_output=True, text=True).stdout
    assert "v=" in said


# -- snapshot and export


def contents(buffer: ReplayBuffer) -> tuple[object, ...]:
    stats = buffer.stats.read()
    drawn = [
        t.id
        for seed in range(3)
        for t in buffer.replay.draw(8, step=stats.trained_step + 1, seed=seed)
    ]
    same = (
        "tiers",
        "version",
        "trained_step",
        "prompts",
        "mean_rbar",
        "fresh",
        "ledger",
        "hints_on",
    )
    return (
        drawn,
        buffer.replay.baselines(["p0", "p1", "none"]),
        *(getattr(stats, name) for name in same),
    )


def test_snapshot_is_one_moment_while_writers_go_on(buffer: ReplayBuffer, tmp_path: Path) -> None:
    token = buffer.replay.new_fencing_token()
    for step in range(6):
        run_step(buffer, step, token)
    buffer.requests.push(requests(6, 3, first=100))
    leases = buffer.requests.lease("a", 2)
    buffer.requests.add_group(make_group(leases[0], [1.0, 0.0]), leases[0], tokens_generated=1)
    buffer.control.set_value("model", {"hidden": 128})
    before = contents(buffer)
    original = buffer._connection.run

    def slow(name: str, *args: object) -> object:
        reply = original(name, *args)
        if (
            name == "snapshot" and args[0] == "begin"
        ):  # everything below happens after the checkpoint
            buffer.requests.add_group(
                make_group(leases[1], [1.0, 1.0]), leases[1], tokens_generated=1
            )
            [late] = buffer.requests.lease("b", 1)
            buffer.requests.add_group(make_group(late, [0.3]), late, tokens_generated=1)
            share = buffer.replay.lease_fresh("l", 6)
            buffer.replay.commit_step(6, 7, [g.id for g in share.groups], token)
            for step in range(7, 40):
                run_step(buffer, step, token)  # evicts most of what the snapshot must hold
        return reply

    buffer._connection.run = slow  # type: ignore[method-assign, assignment]
    report = buffer.snapshot(tmp_path / "cut.avsnap")
    buffer._connection.run = original  # type: ignore[method-assign]
    assert (
        report.trajectories == 35 and report.requests == 2
    )  # a full Medium tier; what waits is apart
    after = contents(buffer)
    assert after != before
    buffer.restore(tmp_path / "cut.avsnap")
    assert contents(buffer) == before
    assert buffer.control.get_value("model") == {"hidden": 128}
    with pytest.raises(FencedError):
        buffer.replay.commit_step(6, 7, [], token)
    waiting = buffer.requests.lease("a", 9)  # leases ended: both requests wait again
    assert [x.request.seq for x in waiting] == [101, 102]
    for lease in waiting:
        buffer.requests.add_group(make_group(lease, [0.0, 1.0]), lease, tokens_generated=1)
    assert len(buffer.replay.lease_fresh("l", 6).groups) == 3
    buffer.stats.check_ledger()


def test_a_snapshot_that_another_began_upon_is_refused(
    buffer: ReplayBuffer, tmp_path: Path
) -> None:
    token = buffer.replay.new_fencing_token()
    run_step(buffer, 0, token)
    path, key = tmp_path / "cut.avsnap", buffer._connection.key("meta")
    buffer.snapshot(path)
    before, client = path.read_bytes(), redis.Redis.from_url(buffer._connection.url)

    def another() -> None:
        buffer._connection.run("snapshot", "begin", 77)
        run_step(buffer, 1, token)

    with pytest.raises(
        RecordError, match="another snapshot began or Redis restarted while it was taken"
    ):
        buffer.snapshot(path, another)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [
        "cut.avsnap"
    ]
    assert (
        client.hget(key, "snap") == b"77"
        and client.hlen(buffer._connection.key("snap:groups")) == 2
    )  # left alone
    assert buffer._connection.run("snapshot", "end", 77) == 1 and client.hget(key, "snap") == b"0"
    buffer.snapshot(path, lambda: None)
    assert path.read_bytes() != before


def test_a_snapshot_by_hand_waits_for_a_checkpoint_and_spares_it(
    buffer: ReplayBuffer, tmp_path: Path
) -> None:
    run_step(buffer, 0, buffer.replay.new_fencing_token())
    by_hand = threading.Thread(target=lambda: buffer.snapshot(tmp_path / "hand.avsnap"))

    def meanwhile() -> None:
        by_hand.start()
        time.sleep(0.3)
        assert not (tmp_path / "hand.avsnap").exists()

    buffer.snapshot(tmp_path / "checkpoint.avsnap", meanwhile)
    by_hand.join()
    assert (tmp_path / "hand.avsnap").exists() and (tmp_path / "checkpoint.avsnap").exists()


def test_a_snapshot_across_a_restart_of_redis_is_refused(tmp_path: Path) -> None:
    with (
        EmbeddedRedis(tmp_path / "aof", appendfsync="always") as server,
        ReplayBuffer.connect(CONFIG, "run", server.url) as buffer,
    ):
        run_step(buffer, 0, buffer.replay.new_fencing_token())

        def restart() -> None:
            server.kill()
            server.start()

        with pytest.raises(RecordError, match="Redis restarted while it was taken; take it again"):
            buffer.snapshot(tmp_path / "cut.avsnap", restart)
        assert not list(tmp_path.glob("cut.avsnap*"))
        assert buffer.snapshot(tmp_path / "cut.avsnap").trajectories == 8


def test_a_damaged_snapshot_is_refused_and_the_run_kept(
    buffer: ReplayBuffer, tmp_path: Path
) -> None:
    token = buffer.replay.new_fencing_token()
    run_step(buffer, 0, token)
    path = tmp_path / "cut.avsnap"
    buffer.snapshot(path)
    good = path.read_bytes()
    before = namespace(buffer)
    for bad in (good[:-3], good[: len(good) // 2], good[:200] + b"?" + good[201:], b"other", b""):
        path.write_bytes(bad)
        with pytest.raises(RecordError):
            buffer.restore(path)
    assert namespace(buffer) == before
    path.write_bytes(good)
    with (
        ReplayBuffer.connect(CONFIG, "second", buffer._connection.url) as second,
        pytest.raises(BufferSetupError, match="is of run run, not second"),
    ):
        second.restore(path)


def test_a_snapshot_of_the_release_before_is_restored(buffer: ReplayBuffer) -> None:
    report = buffer.restore(OLD_SNAPSHOT)
    assert (report.prompts, report.trajectories, report.requests) == (13, 40, 1)
    assert (report.version, report.trained_step) == (6, 5)
    stats, books = buffer.stats.read(), buffer.stats.check_ledger()
    assert (books.generated, books.trained_fresh, books.in_flight) == (14, 12, 1)
    assert books.dropped == {"broken": 1} and books.evicted == 8 and books.tokens == 289
    # All of its prompts tie, so they are Medium now; the next commit brings the tier to its size.
    assert stats.tiers == {"hard": 0, "medium": 40, "easy": 0} and stats.fencing_token == 2
    assert [t.id for t in buffer.replay.draw(8, step=6, seed=0, strategy="uniform")] == [
        *("00000004.2", "00000007.2", "00000004.0", "00000005.2"),
        *("00000010.3", "00000006.2", "00000009.1", "00000007.3"),
    ]  # as that release drew
    assert buffer.requests.quarantined() == {"p101": "broken: video"}
    assert buffer.control.get_value("model") == {"hidden": 128}
    [lease] = buffer.requests.lease("a", 9)
    assert lease.request.prompt_id == "p102" and lease.attempt == 1
    buffer.requests.add_group(make_group(lease, [1.0]), lease, tokens_generated=1)
    assert len(buffer.replay.lease_fresh("learner", 6).groups) == 2


def frame(kind: int, content: object) -> bytes:
    data = msgspec.msgpack.encode(content)
    return struct.pack("<BII", kind, len(data), zlib.crc32(data)) + data


@pytest.mark.parametrize("state", [{"meta": 1}, None], ids=["odd", "none"])
def test_a_snapshot_of_another_shape_is_refused_by_name(
    buffer: ReplayBuffer, tmp_path: Path, state: dict[str, int] | None
) -> None:
    path, before = tmp_path / "odd.snap", namespace(buffer)
    path.write_bytes(b"AVSNAP01" + (frame(0, state) if state else b"") + frame(3, {"prompts": 0}))
    with pytest.raises(RecordError, match=r"odd\.snap was written by another release"):
        buffer.restore(path)
    assert namespace(buffer) == before


def test_a_snapshot_of_another_layout_is_refused_by_name(
    buffer: ReplayBuffer, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(buffer._connection.url)
    client.hset(buffer._connection.key("meta"), "format", 2)
    buffer.snapshot(tmp_path / "newer.snap")
    client.hset(buffer._connection.key("meta"), "format", 1)
    with pytest.raises(BufferSetupError, match="has layout 2, this code has 1; restore it with"):
        buffer.restore(tmp_path / "newer.snap")


def test_a_restore_that_was_cut_short_is_noticed_and_can_be_repeated(
    buffer: ReplayBuffer, tmp_path: Path
) -> None:
    token = buffer.replay.new_fencing_token()
    run_step(buffer, 0, token)
    buffer.snapshot(tmp_path / "cut.avsnap")
    before = contents(buffer)
    original = buffer._connection.run

    def dies(name: str, *args: object) -> object:
        if name == "index":
            raise KeyboardInterrupt
        return original(name, *args)

    buffer._connection.run = dies  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        buffer.restore(tmp_path / "cut.avsnap")
    with pytest.raises(BufferSetupError, match="restore it again"):
        ReplayBuffer.connect(CONFIG, "run", buffer._connection.url)
    with ReplayBuffer.connect(CONFIG, "run", buffer._connection.url, reconfigure=True) as again:
        again.restore(tmp_path / "cut.avsnap")
        assert contents(again) == before


def test_export_holds_every_trajectory(buffer: ReplayBuffer, tmp_path: Path) -> None:
    token = buffer.replay.new_fencing_token()
    run_step(buffer, 0, token)
    assert buffer.export(tmp_path / "x.jsonl") == buffer.export(tmp_path / "x.parquet") == 8
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    record = decode(
        redis.Redis.from_url(buffer._connection.url).get(buffer._connection.key("t:00000000.1"))
        or b""
    )
    for row in (lines[1], table[1]):
        assert row["id"] == record.id and row["token_ids"] == record.token_ids.tolist()
        assert np.array_equal(np.float32(row["logprobs"]), record.logprobs)
    assert (
        lines[1]["components"] == dict(table[1]["components"]) == {"format": 1.0, "accuracy": 1.0}
    )
