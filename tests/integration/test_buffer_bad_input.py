"""What the replay buffer refuses: bad records, bad servers, bad logins; each a typed error that
changes nothing."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import redis

from avatar_rl.buffer_service.errors import (
    BufferAccessError,
    BufferFullError,
    BufferSetupError,
    BufferUnreachableError,
    LedgerError,
    RecordError,
    UnknownRequestError,
)
from avatar_rl.buffer_service.records.codec import FORMAT
from avatar_rl.buffer_service.records.requests import PromptKl, RequestLease, RolloutRequest
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.common.errors import ReplayBufferError
from tests.buffer_records import CONFIG, make_group, namespace, requests, run_step

# -- bad input: typed errors, state unchanged


def with_trajectory(lease: RequestLease, **changes: object) -> object:
    group = make_group(lease, [1.0, 0.0])
    bad = msgspec.structs.replace(group.trajectories[1], **changes)
    return msgspec.structs.replace(group, trajectories=(group.trajectories[0], bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": float("nan")}, "reward is nan"),
        ({"reward": float("inf")}, "reward is inf"),
        ({"components": {"accuracy": float("nan")}}, "component accuracy"),
        (
            {"logprobs": np.array([0, -1, np.nan, 0, 0, 0], np.float32)},
            "log-probability of token 2",
        ),
        (
            {"logprobs": np.array([0, -1, 0, -np.inf, 0, 0], np.float32)},
            "log-probability of token 3",
        ),
        ({"logprobs": np.zeros(6, np.int32)}, "integers and floats"),
        ({"logprobs": np.zeros(5, np.float32)}, "equal length"),
        ({"logprobs": np.zeros((6, 1), np.float32)}, "equal length"),
        ({"token_ids": np.array([0, 1, 2, -1, 4, 5], np.int32)}, "token id is negative"),
        ({"token_ids": np.array([0, 1, 2, 2**31, 4, 5], np.int64)}, "does not fit int32"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"finish_reason": "\ud800"}, "UTF-8"),
        (
            {"token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32)},
            "empty completion",
        ),
        ({"versions": ((-1, 6),)}, "policy versions"),
        ({"versions": ()}, "policy versions"),
        ({"versions": ((0, 5),)}, "account for 5"),
        ({"prompt_id": "other"}, "differs from its group's"),
    ],
)
def test_malformed_groups_change_nothing(
    buffer: ReplayBuffer, changes: dict[str, object], message: str
) -> None:
    buffer.requests.push(requests(0))
    [lease] = buffer.requests.lease("a", 1)
    before = namespace(buffer)
    with pytest.raises(RecordError, match=message):
        buffer.requests.add_group(with_trajectory(lease, **changes), lease, tokens_generated=1)  # type: ignore[arg-type]
    assert namespace(buffer) == before


def test_a_group_its_request_did_not_ask_for_changes_nothing(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0))
    [lease] = buffer.requests.lease("a", 1)
    before = namespace(buffer)
    for other in (
        RolloutRequest(seq=0, prompt_id="stranger", step=0, n=4),
        RolloutRequest(seq=0, prompt_id="p0", step=3, n=4),
        RolloutRequest(seq=99, prompt_id="p99", step=0, n=4),
    ):
        wrong = msgspec.structs.replace(lease, request=other)
        with pytest.raises(UnknownRequestError):
            buffer.requests.add_group(make_group(wrong, [1.0]), wrong, tokens_generated=1)
    assert namespace(buffer) == before


@pytest.mark.parametrize("where", ["replay", "fresh"])
def test_a_corrupt_record_is_quarantined(
    buffer: ReplayBuffer, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = buffer.replay.new_fencing_token()
    run_step(buffer, 0, token)
    buffer.requests.push(requests(1))
    for lease in buffer.requests.lease("a", 2):
        buffer.requests.add_group(make_group(lease, [1.0] * 4), lease, tokens_generated=1)
    tid = "00000001.2" if where == "replay" else "00000003.2"
    key = buffer._connection.key(f"t:{tid}")
    client = redis.Redis.from_url(buffer._connection.url)
    data = bytearray(client.get(key) or b"")
    data[-1] ^= 1
    client.set(key, bytes(data))

    def ask() -> object:
        return (
            buffer.replay.draw(8, step=1, seed=0)
            if where == "replay"
            else buffer.replay.lease_fresh("l", 1)
        )

    ask()  # continues without it by itself
    assert buffer.stats.read().quarantined_records == 1 and f"trajectory {tid}: " in caplog.text
    if where == "fresh":
        assert [g.id for g in buffer.replay.lease_fresh("l", 1).groups] == ["00000002"]
        assert buffer.stats.ledger().dropped == {"corrupt_record": 1}
    buffer.stats.check_ledger()


def test_more_damage_than_an_accident_ends_the_call(buffer: ReplayBuffer) -> None:
    token = buffer.replay.new_fencing_token()
    for step in range(4):
        run_step(buffer, step, token)
    client = redis.Redis.from_url(buffer._connection.url)
    for key in client.keys(buffer._connection.key("t:*")):
        client.set(key, b"?")
    with pytest.raises(RecordError, match="it was put in quarantine"):
        buffer.replay.draw(8, step=4, seed=0)
    assert buffer.stats.read().quarantined_records == 9


def test_ledger_notices_a_loss(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0))
    for lease in buffer.requests.lease("a", 2):
        buffer.requests.add_group(make_group(lease, [1.0]), lease, tokens_generated=1)
    redis.Redis.from_url(buffer._connection.url).zrem(buffer._connection.key("fresh"), "00000001")
    with pytest.raises(LedgerError, match="1 groups unaccounted"):
        buffer.stats.check_ledger()


@pytest.mark.parametrize(
    "changes",
    [{"min_version": -1}, {"step": -1}, {"seq": -1}, {"seq": 10**8}, {"n": 0}, {"prompt_id": ""}],
)
def test_malformed_requests_change_nothing(
    buffer: ReplayBuffer, changes: dict[str, object]
) -> None:
    before = namespace(buffer)
    bad = msgspec.structs.replace(requests(0)[1], **changes)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=f"request {bad.seq}"):
        buffer.requests.push([requests(0)[0], bad])
    assert namespace(buffer) == before


def test_numbers_out_of_range_change_nothing(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0))
    [lease] = buffer.requests.lease("a", 1)
    before = namespace(buffer)
    group = make_group(lease, [1.0])
    for wrong in ({"tokens_generated": -1}, {"tokens_generated": 1, "bound": -1}):
        with pytest.raises(RecordError, match="negative"):
            buffer.requests.add_group(group, lease, **wrong)
    for k3, tokens in ((float("nan"), 4), (0.1, 0)):
        found = PromptKl(prompt_id="p", k3=k3, tokens=tokens, fresh=True)
        with pytest.raises(RecordError, match="behaviour KL of prompt p: "):
            buffer.replay.report_behaviour_kl(0, [found])
    with pytest.raises(ReplayBufferError, match="same_prompt needs prompt_ids"):
        buffer.replay.draw(4, step=0, seed=0, strategy="same_prompt")
    with pytest.raises(ReplayBufferError, match="0 <= rank < world"):
        buffer.replay.draw(4, step=0, seed=0, share=(2, 2))
    assert namespace(buffer) == before


def test_a_record_of_a_newer_format_is_quarantined(
    buffer: ReplayBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    run_step(buffer, 0, buffer.replay.new_fencing_token())
    key = buffer._connection.key("t:00000001.2")
    client = redis.Redis.from_url(buffer._connection.url)
    data = bytearray(client.get(key) or b"")
    data[4:6] = (99).to_bytes(2, "little")
    client.set(key, bytes(data))
    assert len({t.id for t in buffer.replay.draw(8, step=1, seed=0)}) == 7
    assert f"00000001.2: record format 99, this code reads 1 to {FORMAT}" in caplog.text
    assert buffer.stats.read().quarantined_records == 1


# -- servers


def test_a_namespace_of_another_run_is_refused(buffer: ReplayBuffer) -> None:
    client = redis.Redis.from_url(buffer._connection.url)
    client.hset(buffer._connection.key("meta"), "run_id", "somebody")
    before = namespace(buffer)
    with pytest.raises(BufferSetupError, match="belongs to run somebody"):
        ReplayBuffer.connect(CONFIG, "run", buffer._connection.url)
    with pytest.raises(BufferSetupError, match="use up to 64 of"):
        ReplayBuffer.connect(CONFIG, "run}:x", buffer._connection.url)
    assert namespace(buffer) == before


def test_a_server_that_becomes_a_replica_refuses_writes(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "demoted", persistent=False) as demoted:
        buffer = ReplayBuffer.connect(CONFIG, "run", demoted.url)
        buffer.requests.push(requests(0))
        [lease] = buffer.requests.lease("a", 1)
        before = namespace(buffer)
        redis.Redis.from_url(demoted.url).replicaof("127.0.0.1", 1)
        with pytest.raises(
            BufferAccessError, match="read-only replica; give the URL of the primary"
        ):
            buffer.requests.add_group(make_group(lease, [1.0]), lease, tokens_generated=1)
        assert namespace(buffer) == before


def test_another_configuration_is_refused_unless_asked_for(buffer: ReplayBuffer) -> None:
    other = CONFIG.model_copy(update={"capacity": 8})
    with pytest.raises(BufferSetupError, match="cap_easy=25, this client says 2"):
        ReplayBuffer.connect(other, "run", buffer._connection.url)
    token = buffer.replay.new_fencing_token()
    for step in range(3):
        run_step(buffer, step, token)
    with ReplayBuffer.connect(other, "run", buffer._connection.url, reconfigure=True) as smaller:
        run_step(smaller, 3, token)
        easy, medium, hard = other.capacities()
        counts = smaller.stats.read().tiers
        assert counts["hard"] <= hard and counts["medium"] <= medium and counts["easy"] <= easy


def test_layout_of_a_newer_release_is_refused(buffer: ReplayBuffer) -> None:
    redis.Redis.from_url(buffer._connection.url).hset(
        buffer._connection.key("meta"), "format", "99"
    )
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
    client.acl_setuser(
        "avatar", enabled=True, passwords=["+right"], keys=["avatar:*"], commands=["+@all"]
    )
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
        at_once = CONFIG.model_copy(update={"pause_s": 0.0})
        soft = ReplayBuffer.connect(at_once, "run", small.url)
        soft.requests.push(
            [RolloutRequest(seq=i, prompt_id=f"p{i}", step=0, n=4) for i in range(40)]
        )
        leases = soft.requests.lease("a", 40)
        hard = ReplayBuffer.connect(
            at_once.model_copy(update={"memory_limit": 1.0}), "run", small.url
        )
        for buffer in (soft, hard):  # the gauge first, then Redis' own refusal
            stored = buffer.stats.ledger().generated
            with pytest.raises(BufferFullError, match="maxmemory"):
                for i, lease in enumerate(leases[stored:]):
                    buffer._connection._memory_checked = 0.0 if buffer is soft else time.monotonic()
                    buffer.requests.add_group(
                        make_group(lease, [1.0] * 4, tokens=12_000), lease, tokens_generated=1
                    )
                    stored += 1
                    assert i < 30
            assert buffer.stats.check_ledger().generated == stored == buffer.stats.read().fresh
