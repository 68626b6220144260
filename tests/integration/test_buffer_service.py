"""The replay buffer on a real Redis: leases, idempotence, fencing, crashes, snapshots, bad servers and bad records."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import redis

from buffer_service.codec import decode, encode
from buffer_service.config import BufferConfig, HintGateConfig
from buffer_service.errors import (
    BufferAccessError,
    BufferFullError,
    BufferSetupError,
    BufferUnreachableError,
    FencedError,
    LeaseHeldError,
    LedgerError,
    RecordError,
    StepTrainedError,
    UnknownTicketError,
    VersionError,
)
from buffer_service.server import EmbeddedRedis, find_redis_server
from buffer_service.store import ReplayBuffer
from buffer_service.tickets import Ticket, TicketLease
from tests.buffer_records import make_group

CONFIG = BufferConfig(capacity=100, warm_up=4, reconnect_s=20.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), persistent=False) as running:
        yield running


@pytest.fixture
def buffer(server: EmbeddedRedis) -> Iterator[ReplayBuffer]:
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(CONFIG, "run", server.url) as connected:
        yield connected


def tickets(step: int, n: int = 2, *, first: int | None = None, prompt: str = "p") -> list[Ticket]:
    start = step * n if first is None else first
    return [Ticket(seq=start + i, prompt_id=f"{prompt}{start + i}", step=step, n=4) for i in range(n)]


def run_step(buffer: ReplayBuffer, step: int, epoch: int, rewards: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0)) -> None:
    buffer.push_tickets(tickets(step))
    for lease in buffer.lease_tickets("actor", 2, max_staleness=0):
        buffer.add_group(make_group(lease, rewards, version=step), lease, tokens_generated=24)
    share = buffer.lease_fresh("learner", step, epoch=epoch)
    assert share.ready
    buffer.commit_step(step, step + 1, [g.id for g in share.groups], epoch)


def namespace(buffer: ReplayBuffer) -> dict[bytes, bytes]:
    client = redis.Redis.from_url(buffer._connection.url)
    return {key: client.dump(key) or b"" for key in client.keys("*")}


# -- leases


def test_admission_is_by_policy_version(buffer: ReplayBuffer) -> None:
    buffer.push_tickets([t for step in range(3) for t in tickets(step)])
    assert [x.ticket.step for x in buffer.lease_tickets("a", 9, max_staleness=0)] == [0, 0]
    assert [x.ticket.step for x in buffer.lease_tickets("a", 9, max_staleness=1)] == [1, 1]
    assert buffer.lease_tickets("a", 9, max_staleness=1) == []
    buffer.publish_version(1)
    assert [x.ticket.step for x in buffer.lease_tickets("a", 9, max_staleness=1)] == [2, 2]


def test_evaluation_tickets_come_first_once_their_version_is_out(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0))
    rounds = [Ticket(seq=i, prompt_id=f"e{i}", step=0, n=1, kind="eval", round=1, min_version=1) for i in range(2)]
    buffer.push_tickets(rounds)
    assert [x.ticket.kind for x in buffer.lease_tickets("a", 1)] == ["train"]
    buffer.publish_version(1)
    leases = buffer.lease_tickets("a", 9)
    assert [x.ticket.kind for x in leases] == ["eval", "eval", "train"]
    assert not buffer.eval_results(1).complete
    for lease in leases[:2]:
        assert buffer.add_eval(lease, b"answer %d" % lease.ticket.seq)
    assert not buffer.add_eval(leases[0], b"again")
    results = buffer.eval_results(1)
    assert results.complete and results.payloads == {0: b"answer 0", 1: b"answer 1"}
    buffer.clear_eval(1)
    assert buffer.push_tickets(rounds) == 0 and not buffer.eval_results(1).payloads


def test_expired_leases_go_back_lowest_seq_first(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0, 4))
    dead = buffer.lease_tickets("dead", 3, lease_s=0.05)
    time.sleep(0.1)
    assert buffer.reap() == 3
    again = buffer.lease_tickets("b", 9, lease_s=60)
    assert [x.ticket.seq for x in again] == [0, 1, 2, 3]
    assert buffer.renew("dead", dead, 60) == []
    assert buffer.release(dead) == 0
    assert len(buffer.renew("b", again, 60)) == 4
    assert [x.attempt for x in again] == [2, 2, 2, 1]


def test_the_slower_of_two_deliveries_changes_nothing(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0))
    [slow] = buffer.lease_tickets("slow", 1, lease_s=0.01)
    time.sleep(0.03)
    [fast] = buffer.lease_tickets("fast", 1)
    assert fast.ticket == slow.ticket
    assert buffer.add_group(make_group(fast, [1.0] * 4), fast, tokens_generated=1).status == "fresh"
    before = buffer.baselines(["p0"])
    assert buffer.add_group(make_group(slow, [0.0] * 4), slow, tokens_generated=1).status == "duplicate"
    assert buffer.baselines(["p0"]) == before == [1.0]


def test_quarantine_lets_the_step_go_on(buffer: ReplayBuffer) -> None:
    buffer.push_tickets([*tickets(0), Ticket(seq=7, prompt_id="p0", step=1, n=4)])
    bad, good = buffer.lease_tickets("a", 2, max_staleness=0)
    assert buffer.quarantine(bad, "undecodable", "clip.mp4: no video stream")
    assert not buffer.quarantine(bad, "undecodable", "again")
    buffer.add_group(make_group(good, [1.0]), good, tokens_generated=1)
    share = buffer.lease_fresh("l", 0)
    assert share.ready and [g.prompt_id for g in share.groups] == ["p1"]
    assert buffer.lease_tickets("a", 9, max_staleness=1) == []  # p0 is never leased again
    assert buffer.lease_fresh("l", 1).ready
    assert buffer.quarantined() == {"p0": "undecodable: clip.mp4: no video stream"}
    assert buffer.check_ledger().dropped == {"undecodable": 1, "quarantined_prompt": 1}


# -- learner


def test_a_step_is_handed_out_whole_and_split_by_rank(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0, 3))
    leases = buffer.lease_tickets("a", 3)
    assert buffer.lease_fresh("r0", 9).expected == -1
    for lease in reversed(leases[1:]):
        buffer.add_group(make_group(lease, [1.0, 0.0]), lease, tokens_generated=1)
    waiting = buffer.lease_fresh("r0", 0, (0, 2))
    assert (waiting.ready, waiting.missing, waiting.groups) == (False, 1, [])
    buffer.add_group(make_group(leases[0], [1.0, 0.0]), leases[0], tokens_generated=1)
    shares = [buffer.lease_fresh(f"r{rank}", 0, (rank, 2)) for rank in range(2)]
    assert [[g.seq for g in s.groups] for s in shares] == [[0, 2], [1]]
    sent = make_group(leases[1], [1.0, 0.0])
    got = shares[1].groups[0]
    assert all(encode(x) == encode(y) for x, y in zip(sent.trajectories, got.trajectories, strict=True))
    with pytest.raises(LeaseHeldError, match="r0"):
        buffer.lease_fresh("other", 0, (0, 2))


def test_commit_is_idempotent_and_fenced(buffer: ReplayBuffer) -> None:
    old = buffer.new_epoch()
    run_step(buffer, 0, old)
    assert not buffer.commit_step(0, 1, ["00000000"], old).committed
    new = buffer.new_epoch()
    for call in (
        lambda: buffer.commit_step(1, 2, [], old),
        lambda: buffer.lease_fresh("zombie", 1, epoch=old),
        lambda: buffer.publish_version(5, old),
    ):
        with pytest.raises(FencedError, match="epoch 1 is over"):
            call()
    with pytest.raises(VersionError, match="older than 1"):
        buffer.commit_step(1, 0, [], new)
    with pytest.raises(VersionError):
        buffer.publish_version(0)
    with pytest.raises(UnknownTicketError, match="00000077"):
        buffer.commit_step(1, 2, ["00000077"], new)
    with pytest.raises(StepTrainedError):
        buffer.draw(4, step=0, seed=0)
    assert buffer.version() == 1 and buffer.check_ledger().trained_fresh == 2


def test_nothing_of_the_current_step_is_replayed(buffer: ReplayBuffer) -> None:
    epoch = buffer.new_epoch()
    run_step(buffer, 0, epoch)
    buffer.push_tickets(tickets(1))
    for lease in buffer.lease_tickets("a", 2):
        buffer.add_group(make_group(lease, [0.0] * 4, version=1), lease, tokens_generated=1)
    for seed in range(20):
        drawn = buffer.draw(8, step=1, seed=seed, strategy="uniform")
        assert {t.step for t in drawn} == {0} and len({t.id for t in drawn}) == 8


def test_late_groups_are_replay_only(buffer: ReplayBuffer) -> None:
    epoch = buffer.new_epoch()
    buffer.push_tickets(tickets(0))
    first, second = buffer.lease_tickets("a", 2)
    buffer.add_group(make_group(first, [1.0] * 4), first, tokens_generated=1)
    buffer.commit_step(0, 1, ["00000000"], epoch)
    assert buffer.add_group(make_group(second, [0.0] * 4), second, tokens_generated=1).status == "late"
    books = buffer.check_ledger()
    assert (books.generated, books.trained_fresh, books.replay_only, books.in_flight) == (2, 1, 1, 0)
    assert buffer.stats().stock == 8


def test_draws_do_not_depend_on_arrival_order(server: EmbeddedRedis) -> None:
    drawn = []
    for order in (1, -1):
        redis.Redis.from_url(server.url).flushall()
        with ReplayBuffer.connect(CONFIG, "run", server.url) as buffer:
            epoch = buffer.new_epoch()
            for step in range(4):
                buffer.push_tickets(tickets(step, 3, prompt=f"p{step % 2}-"))
                for lease in buffer.lease_tickets("a", 3)[::order]:
                    rewards = [float((lease.ticket.seq + i) % 3 == 0) for i in range(4)]
                    buffer.add_group(make_group(lease, rewards), lease, tokens_generated=1)
                gids = [g.id for g in buffer.lease_fresh("l", step).groups]
                buffer.commit_step(step, step + 1, gids, epoch)
            drawn.append([t.id for t in buffer.draw(16, step=4, seed=3)])
    assert drawn[0] == drawn[1]


def test_stratified_quota_of_four_is_one_one_two(buffer: ReplayBuffer) -> None:
    epoch = buffer.new_epoch()
    means = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]  # q40 = 0.4, q75 = 0.7 (lower order statistics)
    buffer.push_tickets([Ticket(seq=i, prompt_id=f"p{i}", step=0, n=1) for i in range(len(means))])
    for lease in buffer.lease_tickets("a", 99):
        buffer.add_group(make_group(lease, [means[lease.ticket.seq]]), lease, tokens_generated=1)
    buffer.commit_step(0, 1, [f"{i:08d}" for i in range(len(means))], epoch)
    stats = buffer.stats()
    assert (stats.threshold_low, stats.threshold_high) == pytest.approx((0.4, 0.7), abs=4e-9)
    assert stats.tiers == {"hard": 5, "medium": 3, "easy": 3}
    for seed in range(10):
        tiers = [buffer.tier_of(t.prompt_id) for t in buffer.draw(4, step=1, seed=seed)]
        assert sorted(map(str, tiers)) == ["easy", "hard", "hard", "medium"]


def test_uniform_draws_are_uniform(buffer: ReplayBuffer) -> None:
    epoch = buffer.new_epoch()
    for step in range(4):
        run_step(buffer, step, epoch)  # 32 trajectories
    counts: dict[str, int] = {}
    draws = 400
    for seed in range(draws):
        for t in buffer.draw(8, step=4, seed=seed, strategy="uniform"):
            counts[t.id] = counts.get(t.id, 0) + 1
    expected = draws * 8 / 32
    chi2 = sum((counts.get(f"{s:08d}.{i}", 0) - expected) ** 2 / expected for s in range(8) for i in range(4))
    assert chi2 < 61.1  # 31 degrees of freedom, p = 0.001


def test_reuse_limit_counts_steps(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(CONFIG.model_copy(update={"max_reuse": 1}), "run", server.url) as buffer:
        epoch = buffer.new_epoch()
        run_step(buffer, 0, epoch)
        first = {t.id for t in buffer.draw(4, step=1, seed=1)}
        assert {t.id for t in buffer.draw(4, step=1, seed=1)} == first  # a retry
        assert not first & {t.id for t in buffer.draw(4, step=1, seed=2)}  # another rank's
        buffer.commit_step(1, 2, [], epoch)
        assert buffer.stats().stock == 0


def test_hint_fires_when_stuck_and_is_released(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    gate = HintGateConfig(hard_patience=3, kl_below=0.01, zero_patience=99)
    with ReplayBuffer.connect(CONFIG.model_copy(update={"hints": gate}), "run", server.url) as buffer:
        epoch = buffer.new_epoch()

        def visit(step: int, rewards: list[float]) -> bool:
            buffer.push_tickets(
                [Ticket(seq=2 * step + i, prompt_id=p, step=step, n=2) for i, p in enumerate(("x", "y"))]
            )
            leases = {lease.ticket.prompt_id: lease for lease in buffer.lease_tickets("a", 2)}
            buffer.add_group(make_group(leases["x"], rewards), leases["x"], tokens_generated=1)
            buffer.add_group(make_group(leases["y"], [0.9, 0.9]), leases["y"], tokens_generated=1)
            buffer.commit_step(step, step + 1, [f"{2 * step:08d}", f"{2 * step + 1:08d}"], epoch)
            assert not leases["y"].hinted
            return leases["x"].hinted

        buffer.report_behaviour_kl(0.5)
        assert [visit(step, [0.1, 0.1]) for step in range(4)] == [False] * 4  # Hard, but still exploring
        buffer.report_behaviour_kl(0.001)
        assert visit(4, [0.1, 0.1])  # stays Hard with the hint
        assert visit(5, [1.0, 1.0])  # leaves Hard: released
        assert not visit(6, [0.1, 0.1])
        assert buffer.baselines(["x", "x"], [False, True]) == pytest.approx([0.1, (0.1 * 2 + 1.0 * 2) / 4])
        assert buffer.stats().counters["hints_released"] == 1


# -- bad input: typed errors, state unchanged


def with_trajectory(lease: TicketLease, **changes: object) -> object:
    group = make_group(lease, [1.0, 0.0])
    bad = msgspec.structs.replace(group.trajectories[1], **changes)
    return msgspec.structs.replace(group, trajectories=(group.trajectories[0], bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": float("nan")}, "reward is nan"),
        ({"reward": float("inf")}, "reward is inf"),
        ({"components": {"accuracy": float("nan")}}, "component accuracy"),
        ({"logprobs": np.array([0, -1, np.nan, 0, 0, 0], np.float32)}, "log-probability of token 2"),
        ({"logprobs": np.zeros(5, np.float32)}, "equal length"),
        ({"token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32)}, "empty completion"),
        ({"versions": ((-1, 6),)}, "policy versions"),
        ({"versions": ((0, 5),)}, "account for 5"),
        ({"prompt_id": "other"}, "differs from its group's"),
    ],
)
def test_malformed_groups_change_nothing(buffer: ReplayBuffer, changes: dict[str, object], message: str) -> None:
    buffer.push_tickets(tickets(0))
    [lease] = buffer.lease_tickets("a", 1)
    before = namespace(buffer)
    with pytest.raises(RecordError, match=message):
        buffer.add_group(with_trajectory(lease, **changes), lease, tokens_generated=1)  # type: ignore[arg-type]
    assert namespace(buffer) == before


def test_a_group_its_ticket_did_not_ask_for_changes_nothing(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0))
    [lease] = buffer.lease_tickets("a", 1)
    before = namespace(buffer)
    for other in (
        Ticket(seq=0, prompt_id="stranger", step=0, n=4),
        Ticket(seq=0, prompt_id="p0", step=3, n=4),
        Ticket(seq=99, prompt_id="p99", step=0, n=4),
    ):
        wrong = msgspec.structs.replace(lease, ticket=other)
        with pytest.raises(UnknownTicketError):
            buffer.add_group(make_group(wrong, [1.0]), wrong, tokens_generated=1)
    assert namespace(buffer) == before


@pytest.mark.parametrize("where", ["replay", "fresh"])
def test_a_corrupt_record_is_quarantined(buffer: ReplayBuffer, where: str) -> None:
    epoch = buffer.new_epoch()
    run_step(buffer, 0, epoch)
    buffer.push_tickets(tickets(1))
    for lease in buffer.lease_tickets("a", 2):
        buffer.add_group(make_group(lease, [1.0] * 4), lease, tokens_generated=1)
    tid = "00000001.2" if where == "replay" else "00000003.2"
    key = buffer._connection.key(f"t:{tid}")
    client = redis.Redis.from_url(buffer._connection.url)
    data = bytearray(client.get(key) or b"")
    data[-1] ^= 1
    client.set(key, bytes(data))

    def ask() -> object:
        return buffer.draw(8, step=1, seed=0) if where == "replay" else buffer.lease_fresh("l", 1)

    with pytest.raises(RecordError, match=tid):
        ask()
    ask()
    assert buffer.stats().quarantined_records == 1
    if where == "fresh":
        assert [g.id for g in buffer.lease_fresh("l", 1).groups] == ["00000002"]
        assert buffer.ledger().dropped == {"corrupt_record": 1}
    buffer.check_ledger()


def test_ledger_notices_a_loss(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0))
    for lease in buffer.lease_tickets("a", 2):
        buffer.add_group(make_group(lease, [1.0]), lease, tokens_generated=1)
    redis.Redis.from_url(buffer._connection.url).zrem(buffer._connection.key("fresh"), "00000001")
    with pytest.raises(LedgerError, match="1 groups unaccounted"):
        buffer.check_ledger()


# -- servers


def test_another_configuration_is_refused_unless_asked_for(buffer: ReplayBuffer) -> None:
    other = CONFIG.model_copy(update={"capacity": 8})
    with pytest.raises(BufferSetupError, match="cap_easy=25, this client says 2"):
        ReplayBuffer.connect(other, "run", buffer._connection.url)
    epoch = buffer.new_epoch()
    for step in range(3):
        run_step(buffer, step, epoch)
    with ReplayBuffer.connect(other, "run", buffer._connection.url, reconfigure=True) as smaller:
        run_step(smaller, 3, epoch)
        easy, medium, hard = other.capacities()
        counts = smaller.tier_counts()
        assert counts["hard"] <= hard and counts["medium"] <= medium and counts["easy"] <= easy


def test_layout_of_a_newer_release_is_refused(buffer: ReplayBuffer) -> None:
    redis.Redis.from_url(buffer._connection.url).hset(buffer._connection.key("meta"), "format", "99")
    with pytest.raises(BufferSetupError, match="layout 99"):
        ReplayBuffer.connect(CONFIG, "run", buffer._connection.url)


def test_evicting_server_is_refused(server: EmbeddedRedis) -> None:
    client = redis.Redis.from_url(server.url)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(BufferSetupError, match="noeviction"):
            ReplayBuffer.connect(CONFIG, "other", server.url)
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_wrong_password_names_the_remedy_and_not_the_password(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = redis.Redis.from_url(server.url)
    client.acl_setuser("avatar", enabled=True, passwords=["+right"], keys=["avatar:*"], commands=["+@all"])
    config = CONFIG.model_copy(update={"username": "avatar", "password_env": "BUFFER_PASSWORD"})
    monkeypatch.setenv("BUFFER_PASSWORD", "right")
    ReplayBuffer.connect(config, "acl", server.url).close()
    monkeypatch.setenv("BUFFER_PASSWORD", "s3cret")
    begin = time.monotonic()
    with pytest.raises(BufferAccessError, match="check username, password") as caught:
        ReplayBuffer.connect(config, "acl", server.url)
    assert "s3cret" not in str(caught.value) and time.monotonic() - begin < 5


def test_read_only_replica_is_refused(server: EmbeddedRedis, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "replica", persistent=False) as replica:
        redis.Redis.from_url(replica.url).replicaof("127.0.0.1", 1)
        with pytest.raises(BufferAccessError, match="replica"):
            ReplayBuffer.connect(CONFIG, "run", replica.url)


def test_unreachable_server_is_given_up_after_the_deadline(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"reconnect_s": 0.3})
    begin = time.monotonic()
    with pytest.raises(BufferUnreachableError, match="is Redis running there"):
        ReplayBuffer.connect(config, "run", f"unix://{tmp_path}/none.sock")
    assert 0.2 < time.monotonic() - begin < 5


def test_old_redis_is_refused(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {**redis.Redis.from_url(buffer._connection.url).info(), "redis_version": "6.0.16"}
    monkeypatch.setattr(redis.Redis, "info", lambda *_: info)
    with pytest.raises(BufferSetupError, match=r"6\.0\.16; 6\.2 or newer"):
        ReplayBuffer.connect(CONFIG, "run", buffer._connection.url)


def test_full_redis_refuses_and_keeps_its_state(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "small", persistent=False, maxmemory=6 << 20) as small:
        soft = ReplayBuffer.connect(CONFIG, "run", small.url)
        soft.push_tickets([Ticket(seq=i, prompt_id=f"p{i}", step=0, n=4) for i in range(40)])
        leases = soft.lease_tickets("a", 40)
        hard = ReplayBuffer.connect(CONFIG.model_copy(update={"memory_limit": 1.0}), "run", small.url)
        for buffer in (soft, hard):  # the gauge first, then Redis' own refusal
            stored = buffer.ledger().generated
            with pytest.raises(BufferFullError, match="maxmemory"):
                for i, lease in enumerate(leases[stored:]):
                    buffer._connection._memory_checked = 0.0 if buffer is soft else time.monotonic()
                    buffer.add_group(make_group(lease, [1.0] * 4, tokens=12_000), lease, tokens_generated=1)
                    stored += 1
                    assert i < 30
            assert buffer.check_ledger().generated == stored == buffer.stats().fresh


# -- durability


def test_kill_9_of_redis_loses_nothing_acknowledged(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "aof", appendfsync="always") as server:
        buffer = ReplayBuffer.connect(CONFIG, "run", server.url)
        epoch = buffer.new_epoch()
        run_step(buffer, 0, epoch)
        buffer.push_tickets(tickets(1, 40, first=100))
        leases = buffer.lease_tickets("a", 40)
        acknowledged: list[str] = []

        def write() -> None:
            for lease in leases:
                group = make_group(lease, [0.0, 1.0], tokens=300)
                if buffer.add_group(group, lease, tokens_generated=600).status in ("fresh", "duplicate"):
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
        share = buffer.lease_fresh("learner", 1, epoch=epoch)
        assert [g.id for g in share.groups] == sorted(acknowledged) and len(acknowledged) == 40
        assert buffer.check_ledger().generated == 42 and buffer.version() == 1
        buffer.close()


def test_embedded_redis_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys,time; from pathlib import Path; from buffer_service.server import EmbeddedRedis\n"
        "s = EmbeddedRedis(Path(sys.argv[1])).start(); print(s.pid, s.url, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().split()
    assert redis.Redis.from_url(url).ping()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
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
    stats = buffer.stats()
    drawn = [t.id for seed in range(3) for t in buffer.draw(8, step=stats.trained_step + 1, seed=seed)]
    same = ("tiers", "version", "trained_step", "prompts", "mean_rbar", "fresh", "ledger", "hints_on")
    return drawn, buffer.baselines(["p0", "p1", "none"]), *(getattr(stats, name) for name in same)


def test_snapshot_is_one_moment_while_writers_go_on(buffer: ReplayBuffer, tmp_path: Path) -> None:
    epoch = buffer.new_epoch()
    for step in range(6):
        run_step(buffer, step, epoch)
    buffer.push_tickets(tickets(6, 3, first=100))
    leases = buffer.lease_tickets("a", 2)
    buffer.add_group(make_group(leases[0], [1.0, 0.0]), leases[0], tokens_generated=1)
    buffer.put_fact("model", {"hidden": 128})
    before = contents(buffer)
    original = buffer._connection.run

    def slow(name: str, *args: object) -> object:
        reply = original(name, *args)
        if name == "snapshot" and args[0] == "begin":  # everything below happens after the cut
            buffer.add_group(make_group(leases[1], [1.0, 1.0]), leases[1], tokens_generated=1)
            [late] = buffer.lease_tickets("b", 1)
            buffer.add_group(make_group(late, [0.3]), late, tokens_generated=1)
            share = buffer.lease_fresh("l", 6)
            buffer.commit_step(6, 7, [g.id for g in share.groups], epoch)
            for step in range(7, 40):
                run_step(buffer, step, epoch)  # evicts most of what the snapshot must hold
        return reply

    buffer._connection.run = slow  # type: ignore[method-assign, assignment]
    report = buffer.snapshot(tmp_path / "cut.avsnap")
    buffer._connection.run = original  # type: ignore[method-assign]
    assert report.trajectories == 40 and report.tickets == 2  # a full Hard tier; what waits is apart
    after = contents(buffer)
    assert after != before
    buffer.restore(tmp_path / "cut.avsnap")
    assert contents(buffer) == before
    assert buffer.get_fact("model") == {"hidden": 128}
    with pytest.raises(FencedError):
        buffer.commit_step(6, 7, [], epoch)
    waiting = buffer.lease_tickets("a", 9)  # leases ended: both tickets wait again
    assert [x.ticket.seq for x in waiting] == [101, 102]
    for lease in waiting:
        buffer.add_group(make_group(lease, [0.0, 1.0]), lease, tokens_generated=1)
    assert len(buffer.lease_fresh("l", 6).groups) == 3
    buffer.check_ledger()


def test_a_damaged_snapshot_is_refused_and_the_run_kept(buffer: ReplayBuffer, tmp_path: Path) -> None:
    epoch = buffer.new_epoch()
    run_step(buffer, 0, epoch)
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


def test_a_restore_that_was_cut_short_is_noticed_and_can_be_repeated(buffer: ReplayBuffer, tmp_path: Path) -> None:
    epoch = buffer.new_epoch()
    run_step(buffer, 0, epoch)
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
    epoch = buffer.new_epoch()
    run_step(buffer, 0, epoch)
    assert buffer.export(tmp_path / "x.jsonl") == buffer.export(tmp_path / "x.parquet") == 8
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    record = decode(redis.Redis.from_url(buffer._connection.url).get(buffer._connection.key("t:00000000.1")) or b"")
    for row in (lines[1], table[1]):
        assert row["id"] == record.id and row["token_ids"] == record.token_ids.tolist()
        assert np.array_equal(np.float32(row["logprobs"]), record.logprobs)
    assert lines[1]["components"] == dict(table[1]["components"]) == {"format": 1.0, "accuracy": 1.0}


# -- notice board


def test_notice_board(buffer: ReplayBuffer) -> None:
    assert buffer.desired("rollout") is None and buffer.get_fact("x") is None and buffer.flag("stop") is None
    buffer.set_desired("rollout", 3)
    buffer.put_fact("x", {"a": [1, 2.5, None]})
    buffer.beat("actor", "7", 41)
    buffer.set_flag("stop", "SIGTERM")
    assert buffer.desired("rollout") == 3 and buffer.get_fact("x") == {"a": [1, 2.5, None]}
    beat = buffer.beats()["actor/7"]
    assert beat.progress == 41 and 0 <= beat.age_s < 5
    assert buffer.flag("stop") == "SIGTERM"
    buffer.clear_flag("stop")
    buffer.drop_beat("actor", "7")
    assert buffer.flag("stop") is None and buffer.beats() == {}
    with pytest.raises(RecordError, match="fact y"):
        buffer.put_fact("y", dataclasses)


def test_scripts_are_loaded_again_after_a_flush(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0))
    redis.Redis.from_url(buffer._connection.url).script_flush()
    assert len(buffer.lease_tickets("a", 2)) == 2


def test_clear_leaves_other_runs_alone(buffer: ReplayBuffer) -> None:
    with ReplayBuffer.connect(CONFIG, "run2", buffer._connection.url) as other:
        other.push_tickets(tickets(0))
        assert buffer.clear() > 0
        assert other.stats().pending_train == 2
    with pytest.raises(BufferSetupError, match="no run under"):
        buffer.stats()
