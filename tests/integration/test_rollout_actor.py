"""The rollout actor on real Redis, reward actors and engine: leases, delivery, failures, new
weights."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from avatar_rl.actors.rollout import RolloutActor
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.block import pack_weights
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import prepare_base_model, prepare_datasets
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.workers.pool import Pool
from avatar_rl.cluster.workers.specs import rollout_spec
from avatar_rl.prompts.datasets import load_prompts, media_base
from avatar_rl.prompts.record import resolve_uri
from avatar_rl.rewards.config import RewardConfig
from avatar_rl.rewards.scorer import Scorer
from tests.buffer_records import make_group
from tests.tiny_models import respawn

BROKEN = "train-00007"
DEADLINE_S = 40.0
_runs = count()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.01)


class Stage:
    """Services and one actor in this process; every test gets a run of its own in Redis."""

    def __init__(self, folder: Path) -> None:
        settings: dict[str, Any] = {
            "data": {
                "synthetic": {"n_train": 8, "n_heldout": 4, "n_sft": 0},
                "template": {"min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 256},
            },
            "rollout": {
                "max_sequences": 16,
                "engine": {
                    "max_model_len": 320,
                    "max_num_seqs": 16,
                    "kv_cache_memory_bytes": 64 << 20,
                },
                "sampling": {"max_tokens": 24},
            },
            "output": {"cache": folder / "cache"},
        }
        self.config = RunConfig.model_validate(settings)
        self.services = Services(self.config, folder)
        self.services.__enter__()
        self.datasets = datasets = prepare_datasets(self.config, lambda *_: None)
        self.model = prepare_base_model(self.config, lambda *_: None)
        self.weights = respawn(self.model, folder / "second", seed=1)
        for prompt in load_prompts(datasets.train, self.config.data.reader):
            if prompt.id == BROKEN:
                base = media_base(datasets.train, self.config.data.reader)
                resolve_uri(prompt.media.items[0].uri, base).write_bytes(b"not a clip")
        self.pool = Pool(self.config, self.services)
        self.pool.start_weight_store()
        self.pool.start_scorers(datasets.asked)
        self.spec = rollout_spec(
            self.config, "first", self.model, datasets, self.services.redis_url
        )
        self.actor = RolloutActor(
            "rollout-0", self.spec, self.pool.scorers[0], self.pool.weight_store
        )

    def begin(self) -> ReplayBuffer:
        """A new run without contents, for the actor and for the test."""
        name = f"run-{next(_runs)}"
        self.actor.buffer.close()
        self.actor.buffer = ReplayBuffer.connect(self.config.buffer, name, self.services.redis_url)
        self.actor.spec, self.actor.scorer = replace(self.spec, run_id=name), self.pool.scorers[0]
        return ReplayBuffer.connect(self.config.buffer, name, self.services.redis_url)

    def fixed_length(self, tokens: int) -> None:
        sampling = self.spec.sampling.model_copy(update={"max_tokens": tokens, "ignore_eos": True})
        self.actor.spec = replace(self.actor.spec, sampling=sampling)

    def close(self) -> None:
        self.actor.engine.close()
        self.services.stop()


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


@contextmanager
def working(actor: RolloutActor) -> Iterator[Future[dict[str, Any]]]:
    """The actor runs in a thread; leaving stops it and raises what broke it."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(actor.run)
        try:
            yield running
        finally:
            if not running.done():
                actor.stop()
        running.result(DEADLINE_S)


def train(prompts: list[int], *, n: int = 4, first: int = 0, step: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(seq=first + i, prompt_id=f"train-{p:05d}", step=step, n=n)
        for i, p in enumerate(prompts)
    ]


def arrived(buffer: ReplayBuffer, step: int = 0) -> list[Group]:
    """The step's groups once all are in."""
    groups: list[Group] = []

    def ready() -> bool:
        share = buffer.replay.lease_fresh("test", step)
        groups[:] = share.groups
        return share.ready

    until(ready, f"arrival of step {step}")
    return groups


def members(groups: list[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def tokens(groups: list[Group]) -> list[list[int]]:
    return [trajectory.token_ids.tolist() for trajectory in members(groups)]


def test_every_ticket_becomes_one_scored_group(stage: Stage, buffer: ReplayBuffer) -> None:
    buffer.requests.push(train([0, 1, 2, 3, 4, 5, 6, 0, 1, 2]))
    before = stage.actor.stats()
    with working(stage.actor):
        groups = arrived(buffer)
    assert [group.seq for group in groups] == list(range(10))
    assert [group.prompt_id for group in groups][6:8] == ["train-00006", "train-00000"]
    for group in groups:
        assert (
            len(group.trajectories) == 4
            and len({t.token_ids.tobytes() for t in group.trajectories}) > 1
        )
        for trajectory in group.trajectories:
            assert len(trajectory.token_ids) == len(trajectory.logprobs) <= 24
            assert np.isfinite(trajectory.logprobs).all() and (trajectory.logprobs <= 0).all()
            assert (
                trajectory.components.keys() == {"format", "accuracy"}
                and trajectory.components["format"] == -1
            )
    books = buffer.stats.check_ledger()
    assert (books.generated, books.completions, books.in_flight, books.duplicates) == (
        10,
        40,
        10,
        0,
    )
    after = stage.actor.stats()
    written = sum(len(trajectory.token_ids) for trajectory in members(groups))
    assert after["tokens"] - before["tokens"] == books.tokens == written
    assert after["groups"] - before["groups"] == 10 and after["in_flight"] == 0


class Listener(Scorer):
    """A scorer that remembers what it was asked."""

    async def score(self, groups: list[tuple[Any, ...]]) -> Any:
        self.asked = [*getattr(self, "asked", []), *groups]
        return await super().score(groups)

    async def heard(self) -> list[tuple[Any, ...]]:
        return self.asked


def test_fusion_compares_with_rollouts_of_sight_alone_and_of_sound_alone(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    actor, both = stage.actor, [0, 1, 2, 3]
    buffer.requests.push(train(both))
    with working(actor):
        plain = arrived(buffer)
    rewards = RewardConfig(weights={"format": 1.0, "accuracy": 1.0, "fusion": 1.0})
    listener = ray.remote(Listener).remote(rewards, stage.datasets.asked, actor.spec.data)
    asked = [RolloutRequest(seq=9, prompt_id="heldout-00000", step=0, n=1, kind="eval", round=1)]
    with stage.begin() as other:
        actor.spec, actor.scorer = replace(actor.spec, unimodal=True), listener
        other.requests.push([*train(both), *asked])
        with working(actor):
            groups = arrived(other)
            until(lambda: other.requests.eval_results(1).complete, "the evaluation")
        books = other.stats.check_ledger()
    assert tokens(groups) == tokens(plain)  # what is trained on is the same as without
    assert {t.components["fusion"] for t in members(groups)} <= {0.0, 0.3}
    heard = {prompt_id: rest for prompt_id, *rest in ray.get(listener.heard.remote())}
    assert len(heard.pop("heldout-00000")) == 1  # an evaluation asks once
    assert heard.keys() == {f"train-{number:05d}" for number in both}
    spent = 0
    for prompt_id, (whole, parts) in heard.items():
        assert parts.keys() == {"video", "audio"}
        texts = [tuple(text for text, *_ in facts) for facts in (whole, *parts.values())]
        assert [len(found) for found in texts] == [4, 4, 4] and len(set(texts)) == 3
        spent += sum(count for facts in (whole, *parts.values()) for *_, count in facts)
        there = {part: placeholders(actor, prompt_id, part) for part in ("", "video", "audio")}
        assert there == {"": {"video", "audio"}, "video": {"video"}, "audio": {"audio"}}
    assert (
        books.tokens == spent and books.completions == 16
    )  # all that was generated; all that can be trained on


def placeholders(actor: RolloutActor, prompt_id: str, part: str) -> set[str]:
    """Media that the engine was shown."""
    rendered = actor.engine.prepared((prompt_id, False, part))
    assert rendered is not None
    return set(rendered["mm_placeholders"])


def test_a_ticket_gives_the_same_group_whatever_runs_beside_it(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    buffer.requests.push(train([0, 1, 2, 3, 4, 5]))
    with working(stage.actor):
        together = tokens(arrived(buffer))
    with stage.begin() as again:
        with working(stage.actor):
            for seq in range(6):
                again.requests.push(train([seq], first=seq))
                until(lambda seq=seq: again.stats.check_ledger().generated == seq + 1, "the group")  # type: ignore[misc]
        apart = tokens(arrived(again))
    assert apart == together


def test_a_prompt_with_a_broken_clip_is_quarantined_and_the_rest_goes_on(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    buffer.requests.push(train([0, int(BROKEN[-2:]), 1]))
    with working(stage.actor):
        groups = arrived(buffer)
    assert [group.seq for group in groups] == [0, 2]
    assert buffer.requests.quarantined().keys() == {BROKEN}
    assert ".mp4" in buffer.requests.quarantined()[BROKEN]
    books = buffer.stats.check_ledger()
    assert books.generated == 3 and sum(books.dropped.values()) == 1


def test_evaluation_is_greedy_and_answers_each_prompt_once(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    payloads = []
    for round in (1, 2):
        asked = [
            RolloutRequest(
                seq=i, prompt_id=f"heldout-{i:05d}", step=0, n=1, kind="eval", round=round
            )
            for i in range(4)
        ]
        buffer.requests.push(
            [*asked, *train([0, 1], first=10 * round)]
        )  # training goes on beside it
        with working(stage.actor):
            until(
                lambda round=round: buffer.requests.eval_results(round).complete, f"round {round}"
            )  # type: ignore[misc]
        payloads.append(
            {
                seq: json.loads(data)
                for seq, data in buffer.requests.eval_results(round).payloads.items()
            }
        )
    assert payloads[0].keys() == {0, 1, 2, 3}
    assert [payloads[0][seq]["prompt_id"] for seq in range(4)] == [
        f"heldout-{i:05d}" for i in range(4)
    ]
    assert all(payload["accuracy"] is not None for payload in payloads[0].values())
    assert [payloads[0][seq]["text"] for seq in range(4)] == [
        payloads[1][seq]["text"] for seq in range(4)
    ]


def publish(stage: Stage, buffer: ReplayBuffer, version: int) -> None:
    ray.get(stage.pool.weight_store.publish.remote(pack_weights(version, stage.weights)))
    buffer.replay.publish_version(version)


def test_the_next_step_takes_new_weights_in_under_groups_in_flight(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.fixed_length(120)
    actor, old = stage.actor, stage.actor.engine.version
    buffer.requests.push(train([0, 1, 2]))  # leave room for one more
    with working(actor):
        until(lambda: actor.engine.in_flight == 3, "the step in the engine")
        until(lambda: actor.update_policy.prefill_s > 0, "a step of the engine")
        actor.update_policy.prefill_s = (
            0.0  # as if prefilling again cost nothing: else the rest may as well end first
        )
        publish(stage, buffer, old + 1)
        until(lambda: bool(actor._incoming), "the weights at hand")
        buffer.requests.push(train([3, 4, 5], first=3, step=1))
        groups, later = arrived(buffer), arrived(buffer, 1)
    assert actor.engine.version == old + 1 and actor.adopt_s > 0
    for trajectory in members(groups):
        assert [version for version, _ in trajectory.versions] == [old, old + 1]
        assert sum(amount for _, amount in trajectory.versions) == len(trajectory.token_ids) == 120
    assert {trajectory.versions for trajectory in members(later)} == {((old + 1, 120),)}
    assert buffer.stats.check_ledger().completions == 24


def test_a_step_under_way_is_not_prefilled_again_for_new_weights(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.fixed_length(120)
    actor, old = stage.actor, stage.actor.engine.version
    buffer.requests.push(train([0, 1, 2, 3, 4, 5]))
    with working(actor):
        until(lambda: actor.engine.in_flight > 0, "the first prompt in the engine")
        publish(stage, buffer, old + 1)
        groups = arrived(buffer)
        until(lambda: actor.engine.version == old + 1, "the new version, as nothing is left to do")
    assert {version for trajectory in members(groups) for version, _ in trajectory.versions} == {
        old
    }


def test_a_step_beyond_the_staleness_bound_waits_for_its_version(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    version = stage.actor.engine.version
    buffer.replay.publish_version(version)
    buffer.requests.push(train([0], step=version + 1) + train([1], first=1, step=version + 2))
    with working(stage.actor):
        arrived(buffer, version + 1)
        time.sleep(0.3)
        assert buffer.stats.check_ledger().generated == 1
        publish(stage, buffer, version + 1)
        [group] = arrived(buffer, version + 2)
    assert all(trajectory.versions[0][0] == version + 1 for trajectory in group.trajectories)


class OddScorer:
    """Scores 1 after a while, or fails in the way it is told."""

    def __init__(self, how: str) -> None:
        self.how, self.now, self.most = how, 0, 0

    async def score(
        self, groups: list[tuple[str, list[Any]]]
    ) -> list[list[tuple[float | None, dict[str, float | None]]]]:
        return [await self._score(*group) for group in groups]

    async def _score(
        self, prompt_id: str, facts: list[Any]
    ) -> list[tuple[float | None, dict[str, float | None]]]:
        if self.how == "crash":
            raise ValueError("the scorer has a bug")
        if self.how == "masked" and prompt_id == "train-00001":
            return [(None, {"judge": None})] * len(facts)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.5)
        self.now -= 1
        return [(1.0, {"accuracy": 1.0})] * len(facts)

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
    make = stage.pool._remote(RolloutActor, cpus=0, max_concurrency=4)
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


def test_an_actor_goes_on_with_work_whose_own_expired_lease_comes_back(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.fixed_length(150)
    actor = stage.actor
    buffer.requests.push(train([0, 1]))
    with working(actor):
        until(lambda: actor.engine.in_flight == 2, "both prompts in the engine")
        expire(buffer, ["t:00000000", "t:00000001"])
        until(
            lambda: all(lease.attempt == 2 for lease in list(actor._held.values())),
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
        until(lambda: len(actor._ready) == 2, "both prompts prepared")
        expire(buffer, ["t:00000000", "t:00000001"])
        until(
            lambda: all(lease.attempt == 2 for lease in list(actor._held.values())),
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


def test_a_helper_that_breaks_ends_the_run_and_loses_no_ticket(
    stage: Stage, buffer: ReplayBuffer
) -> None:
    stage.actor.scorer = odd_scorer("crash")
    buffer.requests.push(train([0, 1]))
    with pytest.raises(ValueError, match="the scorer has a bug"):
        stage.actor.run()
    assert buffer.stats.check_ledger().generated == 0
    with pytest.raises(ValueError):  # a broken actor stays broken: the supervisor starts another
        stage.actor.run()
