"""The replay buffer on a real Redis: leases, idempotence, fencing, draws, hints, values and
heartbeats."""

from __future__ import annotations

import dataclasses
import os
import socket
import time

import pytest
import redis

from avatar_rl.buffer_service.config import TierShares
from avatar_rl.buffer_service.errors import (
    BufferSetupError,
    FencedError,
    LeaseHeldError,
    RecordError,
    StepTrainedError,
    UnknownRequestError,
    VersionError,
)
from avatar_rl.buffer_service.records.codec import encode
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from tests.buffer_records import CONFIG, make_group, requests, run_step, tier_of

# -- leases


def test_admission_is_by_policy_version(buffer: ReplayBuffer) -> None:
    buffer.requests.push([t for step in range(3) for t in requests(step)])
    assert [x.request.step for x in buffer.requests.lease("a", 9, max_staleness=0)] == [0, 0]
    assert [x.request.step for x in buffer.requests.lease("a", 9, max_staleness=1)] == [1, 1]
    assert buffer.requests.lease("a", 9, max_staleness=1) == []
    buffer.replay.publish_version(1)
    assert [x.request.step for x in buffer.requests.lease("a", 9, max_staleness=1)] == [2, 2]


def test_work_goes_on_while_the_version_is_asked_for_and_may_fail(buffer: ReplayBuffer) -> None:
    buffer.replay.publish_version(3)
    done: list[int] = []

    def work() -> None:
        done.append(1)
        assert buffer.replay.version() == 3  # by another connection: this one has an answer coming
        raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        buffer.replay.version(meanwhile=work)
    assert buffer.replay.version(meanwhile=lambda: done.append(2)) == 3 and done == [1, 2]
    buffer.replay.publish_version(4)
    assert buffer.replay.version() == 4  # not what the failed one had asked for


def test_a_lease_is_bounded_by_completions_and_keeps_the_order(buffer: ReplayBuffer) -> None:
    asked = [
        RolloutRequest(seq=seq, prompt_id=f"p{seq}", step=0, n=n) for seq, n in enumerate((4, 8, 1))
    ]
    buffer.requests.push(asked)
    assert [x.request.n for x in buffer.requests.lease("a", 9, completions=11)] == [
        4
    ]  # the 1 does not overtake the 8
    assert buffer.requests.lease("a", 9, completions=7) == []
    assert [x.request.n for x in buffer.requests.lease("a", 9, completions=9)] == [8, 1]


def test_evaluation_requests_come_first_once_their_version_is_out(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0))
    rounds = [
        RolloutRequest(seq=i, prompt_id=f"e{i}", step=0, n=1, kind="eval", round=1, min_version=1)
        for i in range(2)
    ]
    buffer.requests.push(rounds)
    assert [x.request.kind for x in buffer.requests.lease("a", 1)] == ["train"]
    buffer.replay.publish_version(1)
    leases = buffer.requests.lease("a", 9)
    assert [x.request.kind for x in leases] == ["eval", "eval", "train"]
    assert not buffer.requests.eval_results(1).complete
    for lease in leases[:2]:
        assert buffer.requests.add_eval(lease, b"answer %d" % lease.request.seq)
    assert not buffer.requests.add_eval(leases[0], b"again")
    results = buffer.requests.eval_results(1)
    assert results.complete and results.payloads == {0: b"answer 0", 1: b"answer 1"}
    buffer.requests.clear_eval(1)
    assert buffer.requests.push(rounds) == 0 and not buffer.requests.eval_results(1).payloads


def test_outstanding_requests_are_those_that_wait_or_are_worked_on(buffer: ReplayBuffer) -> None:
    pushed = [RolloutRequest(seq=s, prompt_id=f"p{s}", step=s // 2, n=2, epoch=1) for s in range(4)]
    buffer.requests.push(pushed)
    [lease] = buffer.requests.lease("a", 1, max_staleness=5)
    assert sorted(buffer.requests.outstanding(), key=lambda r: r.seq) == pushed
    buffer.requests.drop(lease, "test")
    assert {r.seq for r in buffer.requests.outstanding()} == {1, 2, 3}
    again = buffer.requests.lease("b", 4, max_staleness=5)
    assert [one.request.seq for one in again] == [1, 2, 3]  # looking took nothing


def test_expired_leases_go_back_lowest_seq_first(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0, 4))
    dead = buffer.requests.lease("dead", 3, lease_s=0.05)
    time.sleep(0.1)
    assert buffer.requests.lease("nobody", 0) == []  # expired leases go back all the same
    assert buffer.stats.read().counters["leases_expired"] == 3
    again = buffer.requests.lease("b", 9, lease_s=60)
    assert [x.request.seq for x in again] == [0, 1, 2, 3]
    assert buffer.requests.renew("dead", dead, 60) == []
    assert buffer.requests.release(dead) == 0
    assert len(buffer.requests.renew("b", again, 60)) == 4
    assert [x.attempt for x in again] == [2, 2, 2, 1]


def test_the_slower_of_two_deliveries_changes_nothing(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0))
    [slow] = buffer.requests.lease("slow", 1, lease_s=0.01)
    time.sleep(0.03)
    [fast] = buffer.requests.lease("fast", 1)
    assert fast.request == slow.request
    assert (
        buffer.requests.add_group(make_group(fast, [1.0] * 4), fast, tokens_generated=1).status
        == "fresh"
    )
    before = buffer.replay.baselines(["p0"])
    assert (
        buffer.requests.add_group(make_group(slow, [0.0] * 4), slow, tokens_generated=1).status
        == "duplicate"
    )
    assert buffer.replay.baselines(["p0"]) == before == [1.0]


def test_quarantine_lets_the_step_go_on(buffer: ReplayBuffer) -> None:
    buffer.requests.push([*requests(0), RolloutRequest(seq=7, prompt_id="p0", step=1, n=4)])
    bad, good = buffer.requests.lease("a", 2, max_staleness=0)
    assert buffer.requests.quarantine(bad, "undecodable", "clip.mp4: no video stream")
    assert not buffer.requests.quarantine(bad, "undecodable", "again")
    buffer.requests.add_group(make_group(good, [1.0]), good, tokens_generated=1)
    share = buffer.replay.lease_fresh("l", 0)
    assert share.ready and [g.prompt_id for g in share.groups] == ["p1"]
    assert buffer.requests.lease("a", 9, max_staleness=1) == []  # p0 is never leased again
    assert buffer.replay.lease_fresh("l", 1).ready
    assert buffer.requests.quarantined() == {"p0": "undecodable: clip.mp4: no video stream"}
    assert buffer.stats.check_ledger().dropped == {"undecodable": 1, "quarantined_prompt": 1}


def test_a_dropped_group_leaves_its_prompt_in_the_stream(buffer: ReplayBuffer) -> None:
    buffer.requests.push([*requests(0), RolloutRequest(seq=7, prompt_id="p0", step=1, n=4)])
    unscored, good = buffer.requests.lease("a", 2, max_staleness=0)
    assert buffer.requests.drop(unscored, "unscored")
    assert not buffer.requests.drop(unscored, "unscored")
    buffer.requests.add_group(make_group(good, [1.0]), good, tokens_generated=1)
    share = buffer.replay.lease_fresh("l", 0)
    assert share.ready and [g.prompt_id for g in share.groups] == ["p1"]
    assert [
        lease.request.prompt_id for lease in buffer.requests.lease("a", 9, max_staleness=1)
    ] == ["p0"]
    assert buffer.requests.quarantined() == {}
    assert buffer.stats.check_ledger().dropped == {"unscored": 1}


# -- learner


def test_a_step_is_handed_out_whole_and_split_by_rank(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0, 3))
    leases = buffer.requests.lease("a", 3)
    assert buffer.replay.lease_fresh("r0", 9).expected == -1
    for lease in reversed(leases[1:]):
        buffer.requests.add_group(make_group(lease, [1.0, 0.0]), lease, tokens_generated=1)
    waiting = buffer.replay.lease_fresh("r0", 0, (0, 2))
    assert (waiting.ready, waiting.missing, waiting.groups) == (False, 1, [])
    buffer.requests.add_group(make_group(leases[0], [1.0, 0.0]), leases[0], tokens_generated=1)
    shares = [buffer.replay.lease_fresh(f"r{rank}", 0, (rank, 2)) for rank in range(2)]
    assert [[g.seq for g in s.groups] for s in shares] == [[0, 2], [1]]
    sent = make_group(leases[1], [1.0, 0.0])
    got = shares[1].groups[0]
    assert all(
        encode(x) == encode(y) for x, y in zip(sent.trajectories, got.trajectories, strict=True)
    )
    with pytest.raises(LeaseHeldError, match="r0"):
        buffer.replay.lease_fresh("other", 0, (0, 2))


def test_commit_is_idempotent_and_fenced(buffer: ReplayBuffer) -> None:
    old = buffer.replay.new_fencing_token()
    run_step(buffer, 0, old)
    assert not buffer.replay.commit_step(0, 1, ["00000000"], old).committed
    new = buffer.replay.new_fencing_token()
    for call in (
        lambda: buffer.replay.commit_step(1, 2, [], old),
        lambda: buffer.replay.lease_fresh("zombie", 1, fencing_token=old),
        lambda: buffer.replay.publish_version(5, old),
    ):
        with pytest.raises(FencedError, match="fencing token 1 is no longer valid, 2 is"):
            call()
    with pytest.raises(VersionError, match="older than 1"):
        buffer.replay.commit_step(1, 0, [], new)
    with pytest.raises(VersionError):
        buffer.replay.publish_version(0)
    with pytest.raises(UnknownRequestError, match="00000077"):
        buffer.replay.commit_step(1, 2, ["00000077"], new)
    with pytest.raises(StepTrainedError):
        buffer.replay.draw(4, step=0, seed=0)
    assert buffer.replay.version() == 1 and buffer.stats.check_ledger().trained_fresh == 2


def test_nothing_of_the_current_step_is_replayed(buffer: ReplayBuffer) -> None:
    token = buffer.replay.new_fencing_token()
    run_step(buffer, 0, token)
    buffer.requests.push(requests(1))
    for lease in buffer.requests.lease("a", 2):
        buffer.requests.add_group(
            make_group(lease, [0.0] * 4, version=1), lease, tokens_generated=1
        )
    for seed in range(20):
        drawn = buffer.replay.draw(8, step=1, seed=seed, strategy="uniform")
        assert {t.step for t in drawn} == {0} and len({t.id for t in drawn}) == 8


def test_late_groups_are_replay_only(buffer: ReplayBuffer) -> None:
    token = buffer.replay.new_fencing_token()
    buffer.requests.push(requests(0))
    first, second = buffer.requests.lease("a", 2)
    buffer.requests.add_group(make_group(first, [1.0] * 4), first, tokens_generated=1)
    buffer.replay.commit_step(0, 1, ["00000000"], token)
    assert (
        buffer.requests.add_group(make_group(second, [0.0] * 4), second, tokens_generated=1).status
        == "late"
    )
    books = buffer.stats.check_ledger()
    assert (books.generated, books.trained_fresh, books.replay_only, books.in_flight) == (
        2,
        1,
        1,
        0,
    )
    assert buffer.stats.read().stock == 8


def test_draws_do_not_depend_on_arrival_order(server: EmbeddedRedis) -> None:
    drawn = []
    for order in (1, -1):
        redis.Redis.from_url(server.url).flushall()
        with ReplayBuffer.connect(CONFIG, "run", server.url) as buffer:
            token = buffer.replay.new_fencing_token()
            for step in range(4):
                buffer.requests.push(requests(step, 3, prompt=f"p{step % 2}-"))
                for lease in buffer.requests.lease("a", 3)[::order]:
                    rewards = [float((lease.request.seq + i) % 3 == 0) for i in range(4)]
                    buffer.requests.add_group(make_group(lease, rewards), lease, tokens_generated=1)
                gids = [g.id for g in buffer.replay.lease_fresh("l", step).groups]
                buffer.replay.commit_step(step, step + 1, gids, token)
            drawn.append([t.id for t in buffer.replay.draw(16, step=4, seed=3)])
    assert drawn[0] == drawn[1]


def test_stratified_quota_of_four_is_one_one_two(buffer: ReplayBuffer) -> None:
    token = buffer.replay.new_fencing_token()
    means = [
        0.0,
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        1.0,
    ]  # mid-ranks (i + 0.5) / 11: 0.32 and 0.41 around q40, 0.68 and 0.77 around q75
    buffer.requests.push(
        [RolloutRequest(seq=i, prompt_id=f"p{i}", step=0, n=1) for i in range(len(means))]
    )
    for lease in buffer.requests.lease("a", 99):
        buffer.requests.add_group(
            make_group(lease, [means[lease.request.seq]]), lease, tokens_generated=1
        )
    buffer.replay.commit_step(0, 1, [f"{i:08d}" for i in range(len(means))], token)
    stats = buffer.stats.read()
    assert (stats.threshold_low, stats.threshold_high) == pytest.approx((0.3, 0.7), abs=4e-9)
    assert stats.tiers == {"hard": 4, "medium": 4, "easy": 3}
    for seed in range(10):
        tiers = [tier_of(buffer, t.prompt_id) for t in buffer.replay.draw(4, step=1, seed=seed)]
        assert sorted(map(str, tiers)) == ["easy", "hard", "hard", "medium"]


def test_uniform_draws_are_uniform(buffer: ReplayBuffer) -> None:
    token = buffer.replay.new_fencing_token()
    for step in range(4):
        run_step(buffer, step, token)  # 32 trajectories
    counts: dict[str, int] = {}
    draws = 400
    for seed in range(draws):
        for t in buffer.replay.draw(8, step=4, seed=seed, strategy="uniform"):
            counts[t.id] = counts.get(t.id, 0) + 1
    expected = draws * 8 / 32
    chi2 = sum(
        (counts.get(f"{s:08d}.{i}", 0) - expected) ** 2 / expected
        for s in range(8)
        for i in range(4)
    )
    assert chi2 < 61.1  # 31 degrees of freedom, p = 0.001


def big_step(buffer: ReplayBuffer, step: int, token: int) -> int:
    """256 groups of 8 of prompts whose averages are spread over [0, 1], committed; how many were
    evicted."""
    asked = [
        RolloutRequest(seq=step * 256 + i, prompt_id=f"p{i % 97}", step=step, n=8)
        for i in range(256)
    ]
    buffer.requests.push(asked)
    for lease in buffer.requests.lease("a", 256, max_staleness=0):
        hits = int(lease.request.prompt_id[1:]) % 9
        group = make_group(lease, [1.0] * hits + [0.0] * (8 - hits), version=step)
        buffer.requests.add_group(group, lease, tokens_generated=1)
    return buffer.replay.commit_step(step, step + 1, [f"{t.seq:08d}" for t in asked], token).evicted


def test_capacity_holds_whatever_a_step_adds(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    small = CONFIG.model_copy(update={"capacity": 1000})
    with ReplayBuffer.connect(small, "run", server.url) as buffer:
        token = buffer.replay.new_fencing_token()
        for step in range(5):
            big_step(buffer, step, token)
            stats = buffer.stats.read()
            assert (
                stats.stock <= 1000 and stats.tiers["hard"] <= 400 and stats.tiers["medium"] <= 350
            )
        assert stats.ledger.evicted == 5 * 2048 - stats.stock


def test_what_is_too_old_goes_however_much_a_step_adds(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    ageing = CONFIG.model_copy(update={"capacity": 100_000, "max_age_versions": 1})
    with ReplayBuffer.connect(ageing, "run", server.url) as buffer:
        token = buffer.replay.new_fencing_token()
        for step in range(4):
            big_step(buffer, step, token)
            assert (
                buffer.stats.read().stock == 2048
            )  # version is step + 1: only the last step's own is young enough


def test_a_tier_beside_an_older_one_of_nearly_the_same_average_is_cut_too(
    server: EmbeddedRedis,
) -> None:
    redis.Redis.from_url(server.url).flushall()
    shares = TierShares(easy=0.2, medium=0.1, hard=0.7)
    config = CONFIG.model_copy(update={"capacity": 1000, "tier_shares": shares})
    with ReplayBuffer.connect(config, "run", server.url) as b:
        token = b.replay.new_fencing_token()
        # Hard 0.500 and Medium 0.505 share an age bin; all of Hard's 320 trajectories are older
        # than Medium's.
        scores = {
            **{f"h{i}": 0.5 for i in range(40)},
            **{f"m{i}": 0.505 for i in range(35)},
            **{f"e{i}": 0.9 for i in range(25)},
        }
        asked = [
            RolloutRequest(seq=seq, prompt_id=name, step=0, n=8) for seq, name in enumerate(scores)
        ]
        b.requests.push(asked)
        for lease in b.requests.lease("a", 100, max_staleness=0):
            group = make_group(lease, [scores[lease.request.prompt_id]] * 8, accuracy=False)
            b.requests.add_group(group, lease, tokens_generated=1)
        b.replay.commit_step(0, 1, [f"{t.seq:08d}" for t in asked], token)
        assert b.stats.read().tiers == {"hard": 320, "medium": 100, "easy": 200}


def test_reuse_limit_counts_steps(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(
        CONFIG.model_copy(update={"max_reuse": 1}), "run", server.url
    ) as buffer:
        token = buffer.replay.new_fencing_token()
        run_step(buffer, 0, token)
        first = {t.id for t in buffer.replay.draw(4, step=1, seed=1)}
        assert {t.id for t in buffer.replay.draw(4, step=1, seed=1)} == first  # a retry
        assert not first & {t.id for t in buffer.replay.draw(4, step=1, seed=2)}  # another rank's
        buffer.replay.commit_step(1, 2, [], token)
        assert buffer.stats.read().stock == 0


# -- values and heartbeats


def test_values_and_heartbeats(buffer: ReplayBuffer) -> None:
    assert buffer.control.desired("rollout") is None and buffer.control.get_value("x") is None
    buffer.control.set_desired("rollout", 3)
    buffer.control.set_value("x", {"a": [1, 2.5, None]})
    buffer.control.heartbeat("actor", "7", 41)
    assert buffer.control.desired("rollout") == 3
    assert buffer.control.get_value("x") == {"a": [1, 2.5, None]}
    beat = buffer.control.heartbeats()["actor/7"]
    assert (beat.progress, beat.host, beat.pid) == (41, socket.gethostname(), os.getpid())
    assert abs(beat.stamp_ms / 1000 - time.time()) < 5
    time.sleep(0.002)
    buffer.control.heartbeat("actor", "7", 41)
    assert buffer.control.watched_heartbeats().keys() == {"actor/7"}  # not the watch's own
    assert buffer.control.heartbeats()["actor/7"].stamp_ms > beat.stamp_ms
    buffer.control.drop_heartbeat("watch", socket.gethostname())
    buffer.control.drop_heartbeat("actor", "7")
    assert buffer.control.heartbeats() == {}
    with pytest.raises(RecordError, match="value y"):
        buffer.control.set_value("y", dataclasses)  # type: ignore[arg-type]


def test_scripts_are_loaded_again_after_a_flush(buffer: ReplayBuffer) -> None:
    buffer.requests.push(requests(0))
    redis.Redis.from_url(buffer._connection.url).script_flush()
    assert len(buffer.requests.lease("a", 2)) == 2


def test_clear_leaves_other_runs_alone(buffer: ReplayBuffer) -> None:
    with ReplayBuffer.connect(CONFIG, "run2", buffer._connection.url) as other:
        other.requests.push(requests(0))
        assert buffer.clear() > 0
        assert other.stats.read().pending_train == 2
    with pytest.raises(BufferSetupError, match="no run under"):
        buffer.stats.read()
