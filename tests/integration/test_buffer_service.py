"""The replay buffer on a real Redis: leases, idempotence, fencing, draws, hints, the notice
board."""

from __future__ import annotations

import dataclasses
import time

import pytest
import redis

from avatar_rl.buffer_service.config import HintGateConfig, TierShares
from avatar_rl.buffer_service.errors import (
    BufferSetupError,
    FencedError,
    LeaseHeldError,
    RecordError,
    StepTrainedError,
    UnknownTicketError,
    VersionError,
)
from avatar_rl.buffer_service.records.codec import encode
from avatar_rl.buffer_service.records.requests import Ticket
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from tests.buffer_records import CONFIG, make_group, run_step, tickets

# -- leases


def test_admission_is_by_policy_version(buffer: ReplayBuffer) -> None:
    buffer.push_tickets([t for step in range(3) for t in tickets(step)])
    assert [x.ticket.step for x in buffer.lease_tickets("a", 9, max_staleness=0)] == [0, 0]
    assert [x.ticket.step for x in buffer.lease_tickets("a", 9, max_staleness=1)] == [1, 1]
    assert buffer.lease_tickets("a", 9, max_staleness=1) == []
    buffer.publish_version(1)
    assert [x.ticket.step for x in buffer.lease_tickets("a", 9, max_staleness=1)] == [2, 2]


def test_work_goes_on_while_the_version_is_asked_for_and_may_fail(buffer: ReplayBuffer) -> None:
    buffer.publish_version(3)
    done: list[int] = []

    def work() -> None:
        done.append(1)
        assert buffer.version() == 3  # by another connection: this one has an answer coming
        raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        buffer.version(meanwhile=work)
    assert buffer.version(meanwhile=lambda: done.append(2)) == 3 and done == [1, 2]
    buffer.publish_version(4)
    assert buffer.version() == 4  # not what the failed one had asked for


def test_a_lease_is_bounded_by_completions_and_keeps_the_order(buffer: ReplayBuffer) -> None:
    asked = [Ticket(seq=seq, prompt_id=f"p{seq}", step=0, n=n) for seq, n in enumerate((4, 8, 1))]
    buffer.push_tickets(asked)
    assert [x.ticket.n for x in buffer.lease_tickets("a", 9, completions=11)] == [
        4
    ]  # the 1 does not overtake the 8
    assert buffer.lease_tickets("a", 9, completions=7) == []
    assert [x.ticket.n for x in buffer.lease_tickets("a", 9, completions=9)] == [8, 1]


def test_evaluation_tickets_come_first_once_their_version_is_out(buffer: ReplayBuffer) -> None:
    buffer.push_tickets(tickets(0))
    rounds = [
        Ticket(seq=i, prompt_id=f"e{i}", step=0, n=1, kind="eval", round=1, min_version=1)
        for i in range(2)
    ]
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
    assert (
        buffer.add_group(make_group(slow, [0.0] * 4), slow, tokens_generated=1).status
        == "duplicate"
    )
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


def test_a_dropped_group_leaves_its_prompt_in_the_stream(buffer: ReplayBuffer) -> None:
    buffer.push_tickets([*tickets(0), Ticket(seq=7, prompt_id="p0", step=1, n=4)])
    unscored, good = buffer.lease_tickets("a", 2, max_staleness=0)
    assert buffer.drop(unscored, "unscored")
    assert not buffer.drop(unscored, "unscored")
    buffer.add_group(make_group(good, [1.0]), good, tokens_generated=1)
    share = buffer.lease_fresh("l", 0)
    assert share.ready and [g.prompt_id for g in share.groups] == ["p1"]
    assert [lease.ticket.prompt_id for lease in buffer.lease_tickets("a", 9, max_staleness=1)] == [
        "p0"
    ]
    assert buffer.quarantined() == {}
    assert buffer.check_ledger().dropped == {"unscored": 1}


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
    assert all(
        encode(x) == encode(y) for x, y in zip(sent.trajectories, got.trajectories, strict=True)
    )
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
    assert (
        buffer.add_group(make_group(second, [0.0] * 4), second, tokens_generated=1).status == "late"
    )
    books = buffer.check_ledger()
    assert (books.generated, books.trained_fresh, books.replay_only, books.in_flight) == (
        2,
        1,
        1,
        0,
    )
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
    ]  # q40 = 0.4, q75 = 0.7 (lower order statistics)
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
    chi2 = sum(
        (counts.get(f"{s:08d}.{i}", 0) - expected) ** 2 / expected
        for s in range(8)
        for i in range(4)
    )
    assert chi2 < 61.1  # 31 degrees of freedom, p = 0.001


def big_step(buffer: ReplayBuffer, step: int, epoch: int) -> int:
    """256 groups of 8 of prompts whose averages are spread over [0, 1], committed; how many were
    evicted."""
    asked = [Ticket(seq=step * 256 + i, prompt_id=f"p{i % 97}", step=step, n=8) for i in range(256)]
    buffer.push_tickets(asked)
    for lease in buffer.lease_tickets("a", 256, max_staleness=0):
        hits = int(lease.ticket.prompt_id[1:]) % 9
        group = make_group(lease, [1.0] * hits + [0.0] * (8 - hits), version=step)
        buffer.add_group(group, lease, tokens_generated=1)
    return buffer.commit_step(step, step + 1, [f"{t.seq:08d}" for t in asked], epoch).evicted


def test_capacity_holds_whatever_a_step_adds(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    small = CONFIG.model_copy(update={"capacity": 1000})
    with ReplayBuffer.connect(small, "run", server.url) as buffer:
        epoch = buffer.new_epoch()
        for step in range(5):
            big_step(buffer, step, epoch)
            stats = buffer.stats()
            assert (
                stats.stock <= 1000 and stats.tiers["hard"] <= 400 and stats.tiers["medium"] <= 350
            )
        assert stats.ledger.evicted == 5 * 2048 - stats.stock


def test_what_is_too_old_goes_however_much_a_step_adds(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    ageing = CONFIG.model_copy(update={"capacity": 100_000, "max_age_versions": 1})
    with ReplayBuffer.connect(ageing, "run", server.url) as buffer:
        epoch = buffer.new_epoch()
        for step in range(4):
            big_step(buffer, step, epoch)
            assert (
                buffer.stats().stock == 2048
            )  # version is step + 1: only the last step's own is young enough


def test_a_tier_beside_an_older_one_of_nearly_the_same_average_is_cut_too(
    server: EmbeddedRedis,
) -> None:
    redis.Redis.from_url(server.url).flushall()
    shares = TierShares(easy=0.2, medium=0.1, hard=0.7)
    config = CONFIG.model_copy(update={"capacity": 1000, "tier_shares": shares})
    with ReplayBuffer.connect(config, "run", server.url) as b:
        epoch = b.new_epoch()
        # Hard 0.500 and Medium 0.505 share an age bin; all of Hard's 320 trajectories are older
        # than Medium's.
        for step, (name, count, reward) in enumerate(
            (("h", 40, 0.5), ("m", 35, 0.505), ("e", 25, 0.9))
        ):
            asked = [
                Ticket(seq=40 * step + i, prompt_id=f"{name}{i}", step=step, n=8)
                for i in range(count)
            ]
            b.push_tickets(asked)
            for lease in b.lease_tickets("a", 99, max_staleness=0):
                b.add_group(
                    make_group(lease, [reward] * 8, accuracy=False), lease, tokens_generated=1
                )
            b.commit_step(step, step + 1, [f"{t.seq:08d}" for t in asked], epoch)
        assert b.stats().tiers == {"hard": 320, "medium": 100, "easy": 200}


def test_reuse_limit_counts_steps(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(
        CONFIG.model_copy(update={"max_reuse": 1}), "run", server.url
    ) as buffer:
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
    with ReplayBuffer.connect(
        CONFIG.model_copy(update={"hints": gate}), "run", server.url
    ) as buffer:
        epoch = buffer.new_epoch()

        def visit(step: int, rewards: list[float]) -> bool:
            buffer.push_tickets(
                [
                    Ticket(seq=2 * step + i, prompt_id=p, step=step, n=2)
                    for i, p in enumerate(("x", "y"))
                ]
            )
            leases = {lease.ticket.prompt_id: lease for lease in buffer.lease_tickets("a", 2)}
            buffer.add_group(make_group(leases["x"], rewards), leases["x"], tokens_generated=1)
            buffer.add_group(make_group(leases["y"], [0.9, 0.9]), leases["y"], tokens_generated=1)
            buffer.commit_step(step, step + 1, [f"{2 * step:08d}", f"{2 * step + 1:08d}"], epoch)
            assert not leases["y"].hinted
            return leases["x"].hinted

        buffer.report_behaviour_kl(0.5)
        assert [visit(step, [0.1, 0.1]) for step in range(4)] == [
            False
        ] * 4  # Hard, but still exploring
        buffer.report_behaviour_kl(0.001)
        assert visit(4, [0.1, 0.1])  # stays Hard with the hint
        assert visit(5, [1.0, 1.0])  # leaves Hard: released
        assert not visit(6, [0.1, 0.1])
        assert buffer.baselines(["x", "x"], [False, True]) == pytest.approx(
            [0.1, (0.1 * 2 + 1.0 * 2) / 4]
        )
        assert buffer.averages(["x", "never asked", "y"]) == pytest.approx(
            {"x": 0.1, "y": 0.9}
        )  # hinted visits aside
        assert buffer.stats().counters["hints_released"] == 1


# -- notice board


def test_notice_board(buffer: ReplayBuffer) -> None:
    assert (
        buffer.desired("rollout") is None
        and buffer.get_fact("x") is None
        and buffer.flag("stop") is None
    )
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
