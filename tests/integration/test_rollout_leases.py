"""The rollout actor's leases on real Redis and engine: scored, given back, renewed, taken over."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from avatar_rl.actors.rollout import RolloutActor
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.common.scoring import CompletionScore, UnscoredGroup
from tests.buffer_records import make_group
from tests.rollout_stage import DEADLINE_S, Stage, arrived, train, until, working


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("rollout"))
    yield stage
    stage.close()


@pytest.fixture
def buffer(stage: Stage) -> Iterator[ReplayBuffer]:
    buffer = stage.begin()
    yield buffer
    buffer.close()


class OddScorer:
    """Scores 1 after a while, or fails in the way it is told."""

    def __init__(self, how: str) -> None:
        self.how, self.now, self.most = how, 0, 0

    async def score(self, groups: list[UnscoredGroup]) -> list[list[CompletionScore]]:
        return [await self._score(group) for group in groups]

    async def _score(self, group: UnscoredGroup) -> list[CompletionScore]:
        if self.how == "crash":
            raise ValueError("the scorer has a bug")
        n = len(group.completions)
        if self.how == "masked" and group.prompt_id == "train-00001":
            return [CompletionScore(reward=None, components={"judge": None})] * n
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.5)
        self.now -= 1
        return [CompletionScore(reward=1.0, components={"accuracy": 1.0})] * n

    async def most_at_once(self) -> int:
        return self.most


def odd_scorer(how: str) -> Any:
    return ray.remote(OddScorer).options(num_cpus=0, max_concurrency=64).remote(how)


def test_groups_that_take_long_to_score_are_scored_side_by_side(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.actor.scorer, stage.actor.spec = (
        odd_scorer("slow"),
        replace(stage.actor.spec, scores_together=False),
    )
    buffer.requests.push(train([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]))
    with working(stage.actor):
        assert len(arrived(buffer)) == 12
    assert ray.get(stage.actor.scorer.most_at_once.remote()) >= 6


def test_a_group_without_any_score_is_dropped_with_its_reason(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.actor.scorer = odd_scorer("masked")
    buffer.requests.push(train([0, 1, 2]))
    with working(stage.actor):
        assert [group.seq for group in arrived(buffer)] == [0, 2]
        until(lambda: buffer.stats.ledger().dropped == {"unscored": 1}, "dropping the group")
    assert buffer.requests.quarantined() == {}  # the prompt is not at fault when a judge is out


def test_a_stopped_actor_gives_its_leases_back(stage: Stage, buffer: ReplayBuffer) -> None:
    stage.fixed_length(150)
    buffer.requests.push(train([0, 1, 2, 3, 4, 5]))
    with working(stage.actor):
        until(lambda: stage.actor.engine.in_flight > 0, "the first prompt in the engine")
    leases = buffer.requests.lease("another", 6)
    assert len(leases) + buffer.stats.check_ledger().generated == 6 and len(leases) >= 4
    assert {lease.attempt for lease in leases} <= {1, 2} and any(
        lease.attempt == 2 for lease in leases
    )
    assert stage.actor.stats()["in_flight"] == 0


def test_a_draining_actor_delivers_what_it_began_and_gives_the_rest_back(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.fixed_length(150)
    version = stage.actor.engine.version
    buffer.replay.publish_version(version)
    buffer.requests.push(train([0, 1, 2, 3, 4], step=version + 1))
    with working(stage.actor) as running:
        until(lambda: stage.actor.engine.in_flight > 0, "the first prompt in the engine")
        stage.actor.drain()
        totals = running.result(DEADLINE_S)
    assert totals["in_flight"] == 0
    delivered = buffer.stats.check_ledger().generated
    left = buffer.requests.lease("another", 8)
    assert delivered >= 1 and delivered + len(left) == 5
    assert buffer.stats.read().counters.get("leases_expired", 0) == 0


def test_another_actor_takes_over_from_one_that_was_killed(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    spec = replace(stage.actor.spec, lease_s=3.0)
    sampling = spec.sampling.model_copy(update={"max_tokens": 150, "ignore_eos": True})
    buffer.requests.push(train([0, 1, 2, 3, 4, 5]))
    make = stage.pool.actor_class(RolloutActor, cpus=0, max_concurrency=4)
    doomed = make.remote(
        "doomed", replace(spec, sampling=sampling), odd_scorer("slow"), stage.pool.weight_store
    )
    ray.get(doomed.ready.remote(), timeout=120)
    doomed.run.remote()
    until(lambda: ray.get(doomed.stats.remote())["in_flight"] > 0, "a lease")
    ray.kill(doomed)
    lost = 6 - buffer.stats.check_ledger().generated
    assert lost > 0
    stage.actor.spec = spec
    with working(stage.actor):
        groups = arrived(buffer)
    assert [group.seq for group in groups] == list(range(6))
    books = buffer.stats.check_ledger()
    assert (books.generated, books.completions) == (6, 24)


def test_leases_are_renewed_while_groups_take_longer_than_a_lease(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.actor.spec = replace(stage.actor.spec, lease_s=0.6)
    stalled = threading.Event()
    step = stage.actor.engine.step

    def slow_step() -> Any:
        if not stalled.is_set():
            stalled.set()
            time.sleep(2.0)
        return step()

    buffer.requests.push(train([0, 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.actor.engine, "step", slow_step)
        with working(stage.actor):
            until(stalled.is_set, "the first engine step")
            time.sleep(1.5)
            assert buffer.requests.lease("thief", 2) == []
            arrived(buffer)


def expire(buffer: ReplayBuffer, keys: list[str]) -> None:
    """As if the actor had stood still for longer than a lease."""
    buffer._connection.client.zadd(
        buffer._connection.key("leased"), dict.fromkeys(keys, 1), xx=True
    )


def test_an_actor_continues_a_group_whose_own_expired_lease_comes_back(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.fixed_length(150)
    actor = stage.actor
    buffer.requests.push(train([0, 1]))
    with working(actor):
        until(lambda: actor.engine.in_flight == 2, "both prompts in the engine")
        expire(buffer, ["t:00000000", "t:00000001"])
        until(
            lambda: all(lease.attempt == 2 for lease in list(actor.state.held.values())),
            "the leases again",
        )
        assert [group.seq for group in arrived(buffer)] == [0, 1]
    assert buffer.requests.quarantined() == {}
    books = buffer.stats.check_ledger()
    assert (books.generated, books.completions, books.duplicates) == (
        2,
        8,
        0,
    )  # and nothing was generated twice
    assert buffer.stats.read().counters["leases_expired"] == 2


def test_a_draining_actor_gives_back_leases_that_had_come_back_to_it(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    actor, version = stage.actor, stage.actor.engine.version
    buffer.replay.publish_version(
        version + 1
    )  # which the engine never gets: the prompts wait before it
    buffer.requests.push(train([0, 1], step=version + 2))
    with working(actor) as running:
        until(lambda: len(actor.state.ready) == 2, "both prompts prepared")
        expire(buffer, ["t:00000000", "t:00000001"])
        until(
            lambda: all(lease.attempt == 2 for lease in list(actor.state.held.values())),
            "the leases again",
        )
        actor.drain()
        assert running.result(DEADLINE_S)["in_flight"] == 0
    assert [lease.attempt for lease in buffer.requests.lease("another", 8)] == [3, 3]


def test_a_prompt_without_a_hint_is_asked_plainly_when_the_gate_fires(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    actor = stage.actor
    plain = actor.prompts["train-00000"].model_copy(update={"hint": None})
    epoch = buffer.replay.new_fencing_token()
    zero = train([0, 0, 0, 1, 1, 1])  # visits at zero accuracy: the gate fires for both prompts
    buffer.requests.push(zero)
    for lease in buffer.requests.lease("test", 9):
        buffer.requests.add_group(make_group(lease, [0.0] * 4), lease, tokens_generated=1)
    buffer.replay.commit_step(0, 0, [f"{request.seq:08d}" for request in zero], epoch)
    buffer.requests.push(train([0, 1], first=6, step=1))
    known = {
        **{id: actor.prompts[id] for id in ("train-00000", "train-00001")},
        "train-00000": plain,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor, "prompts", known)
        with working(actor):
            groups = arrived(buffer, 1)
    assert buffer.requests.quarantined() == {}
    assert [group.hinted for group in groups] == [False, True]
    assert [{t.hinted for t in group.trajectories} for group in groups] == [{False}, {True}]
    buffer.replay.commit_step(1, 1, [group.id for group in groups], epoch)
    rewards = [sum(t.reward for t in group.trajectories) for group in groups]
    plainly, hinted = buffer.replay.baselines(["train-00000", "train-00001"], [False, True])
    assert plainly == pytest.approx(rewards[0] / 16) and hinted == pytest.approx(rewards[1] / 4)


def test_a_helper_that_breaks_ends_the_run_and_loses_no_request(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.actor.scorer = odd_scorer("crash")
    buffer.requests.push(train([0, 1]))
    with pytest.raises(ValueError, match="the scorer has a bug"):
        stage.actor.run()
    assert buffer.stats.check_ledger().generated == 0
    with pytest.raises(ValueError):  # a broken actor stays broken: the supervisor starts another
        stage.actor.run()
