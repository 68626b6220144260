"""The rollout actor on real Redis, reward actors and engine: groups, evaluations, new weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import ray

from avatar_rl.actors.rollout import RolloutActor
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.block import pack_weights
from avatar_rl.common.errors import AvatarError, DataError
from avatar_rl.common.scoring import CompletionScore, UnscoredGroup
from avatar_rl.rewards.actor import RewardActor
from avatar_rl.rewards.config import RewardConfig
from tests.rollout_stage import BROKEN, Stage, arrived, members, tokens, train, until, working


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


def test_every_request_becomes_one_scored_group(stage: Stage, buffer: ReplayBuffer) -> None:
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


class Listener(RewardActor):
    """A reward actor that remembers what it was asked."""

    async def score(
        self, groups: Sequence[UnscoredGroup]
    ) -> list[list[CompletionScore] | AvatarError]:
        self.asked = [*getattr(self, "asked", []), *groups]
        return await super().score(groups)

    async def heard(self) -> list[UnscoredGroup]:
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
    heard = {group.prompt_id: group for group in ray.get(listener.heard.remote())}
    asked_once = heard.pop("heldout-00000")  # an evaluation has no unimodal parts
    assert asked_once.video_only is None and asked_once.audio_only is None
    assert heard.keys() == {f"train-{number:05d}" for number in both}
    spent = 0
    for prompt_id, group in heard.items():
        assert group.video_only is not None and group.audio_only is not None
        parts = (group.completions, group.video_only, group.audio_only)
        texts = [tuple(one.text for one in completions) for completions in parts]
        assert [len(found) for found in texts] == [4, 4, 4] and len(set(texts)) == 3
        spent += sum(one.tokens for completions in parts for one in completions)
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


def test_a_request_gives_the_same_group_whatever_runs_beside_it(
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


def test_the_parity_probe_leaves_out_what_training_sets_aside(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"train-{number:05d}" for number in range(8)]
    sizes = {one["prompt_id"]: len(one["prompt_token_ids"]) for one in stage.actor.probe(ids, 8, 4)}
    assert list(sizes) == [name for name in ids if name != BROKEN]  # in order
    longest = max(sizes, key=lambda name: sizes[name])
    template = stage.actor.encoder.config.model_copy(
        update={"max_prompt_tokens": sizes[longest] - 1}
    )
    monkeypatch.setattr(stage.actor.encoder, "config", template)
    found = [one["prompt_id"] for one in stage.actor.probe([BROKEN, longest, *ids], 2, 4)]
    fitting = [name for name in sizes if sizes[name] < sizes[longest]]
    assert found == fitting[:2]
    with pytest.raises(DataError, match=f"{longest}.* max_prompt_tokens is"):
        stage.actor.probe([longest], 2, 4)


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
        until(lambda: bool(actor.state.incoming), "the weights at hand")
        buffer.requests.push(train([3, 4, 5], first=3, step=1))
        groups, later = arrived(buffer), arrived(buffer, 1)
    assert actor.engine.version == old + 1 and actor.state.totals.adopt_s > 0
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
