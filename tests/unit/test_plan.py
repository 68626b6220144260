"""A step as data: advantages by hand, hosts of replays, totals, and the same plan on every rank."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.learner.batch.plan import StepPlan, StepWork, plan_step
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig


def trajectory(group: str, index: int, prompt: str, reward: float, **changes: Any) -> Trajectory:
    tokens = changes.pop("tokens", 4)
    values: dict[str, Any] = {
        "id": f"{group}.{index}",
        "group_id": group,
        "prompt_id": prompt,
        "index": index,
        "hinted": False,
        "prompt_tokens": 10,
        "prompt_digest": 0,
        "token_ids": np.arange(tokens, dtype=np.int32),
        "logprobs": -np.ones(tokens, dtype=np.float32),
        "versions": ((5, tokens),),
        "finish_reason": "stop",
        "temperature": 1.0,
        "reward": reward,
        "components": {},
        "step": 6,
    }
    return Trajectory(**(values | changes))


def group(seq: int, prompt: str, rewards: list[float], **changes: Any) -> Group:
    name = f"{seq:08d}"
    members = tuple(
        trajectory(name, i, prompt, reward, **changes) for i, reward in enumerate(rewards)
    )
    return Group(id=name, prompt_id=prompt, seq=seq, step=6, hinted=False, trajectories=members)


def stored(*records: tuple[str, float], **changes: Any) -> tuple[Trajectory, ...]:
    return tuple(
        trajectory("old", i, prompt, reward, **changes)
        for i, (prompt, reward) in enumerate(records)
    )


def plan(
    groups: list[Group],
    replays: tuple[Trajectory, ...],
    baselines: list[float],
    *,
    ranks: int = 1,
    **settings: Any,
) -> StepPlan:
    objective = ObjectiveConfig(**settings.pop("objective", {}))
    work = StepWork(6, 6, tuple(groups), replays, tuple(baselines))
    return plan_step(
        work, LearnerConfig(objective=objective, **settings), ranks=ranks, max_tokens=8
    )


GROUPS = [group(0, "a", [1.0, 0.0]), group(1, "b", [0.5, 0.5])]
REPLAYS = stored(("b", 1.0), ("c", 0.0), ("a", 1.0), ("b", 0.0))
BASELINES = [0.25, 0.5, 0.75, 0.1]
HALF = 0.5 / (np.sqrt(0.5) + 1e-4)  # two rewards 1 and 0: mean 0.5, deviation sqrt(0.5)
SIGMA = np.sqrt(4 / 3) / 2  # of the replayed rewards 1, 0, 1, 0
VCRS = [0.75 / SIGMA, -0.5 / SIGMA, 0.25 / SIGMA, -0.1 / SIGMA]


def test_vcrs_advantages_of_a_mixed_step() -> None:
    result = plan(GROUPS, REPLAYS, BASELINES)
    assert [t.id for t in result.trajectories[:4]] == [
        "00000000.0",
        "00000000.1",
        "00000001.0",
        "00000001.1",
    ]
    assert result.trajectories[4:] == list(REPLAYS)
    assert result.is_replay.tolist() == [False] * 4 + [True] * 4
    assert result.sequences(kind=False) == 4 and result.sequences(kind=True) == 4
    np.testing.assert_allclose(result.advantages.values, [HALF, -HALF, 0, 0, *VCRS], rtol=1e-9)
    assert result.advantages.dead_before.tolist() == [False, True]
    assert result.advantages.dead_after.tolist() == [False, False]


def test_joint_advantages_take_in_the_replays_of_the_same_prompt() -> None:
    result = plan(GROUPS, REPLAYS, BASELINES, objective={"replay_advantage": "joint"})
    # "a" with its replay: 1, 0, 1, mean 2/3, deviation sqrt(1/3); "b": 0.5, 0.5, 1, 0, deviation
    # sqrt(1/6).
    a, b = np.sqrt(1 / 3) + 1e-4, np.sqrt(1 / 6) + 1e-4
    expected = [1 / 3 / a, -2 / 3 / a, 0, 0, 0.5 / b, VCRS[1], 1 / 3 / a, -0.5 / b]
    np.testing.assert_allclose(result.advantages.values, expected, rtol=1e-9, atol=1e-12)


def test_a_replay_without_room_beside_its_prompt_goes_to_the_emptiest_group() -> None:
    # One replay per group: the second replay of "a" is hosted by "b", so joint leaves it its VCRS
    # advantage and wakes the dead group "b".
    replays = stored(("a", 1.0), ("a", 0.0))
    result = plan(GROUPS, replays, [0.25, 0.25], objective={"replay_advantage": "joint"})
    a, sigma = np.sqrt(1 / 3) + 1e-4, np.sqrt(0.5)
    expected = [1 / 3 / a, -2 / 3 / a, 0, 0, 1 / 3 / a, -0.25 / sigma]
    np.testing.assert_allclose(result.advantages.values, expected, rtol=1e-9, atol=1e-12)
    assert result.advantages.dead_after.tolist() == [False, False]


def test_replays_spread_evenly_over_the_groups() -> None:
    # Fresh groups all dead: whichever group hosts one of the replays (advantage not 0) wakes up.
    groups = [group(i, f"p{i}", [0.5, 0.5]) for i in range(4)]
    strangers = stored(*[(f"q{i}", 1.0) for i in range(4)])
    assert plan(groups, strangers, [0.0] * 4).advantages.dead_after.tolist() == [False] * 4
    assert plan(groups, strangers[:3], [0.0] * 3).advantages.dead_after.tolist() == [False] * 3 + [
        True
    ]
    assert plan(groups, strangers, [0.0, 0.0, 1.0, 0.0]).advantages.dead_after.tolist() == [
        False,
        False,
        True,
        False,
    ]


def test_totals_count_the_whole_step() -> None:
    groups = [
        group(0, "a", [1.0, 0.0], tokens=3),
        group(1, "b", [1.0, 0.0], tokens=8, finish_reason="length"),
    ]
    replays = stored(("b", 1.0), tokens=5)
    totals = plan(groups, replays, [0.5]).totals
    assert (totals.fresh_sequences, totals.replay_sequences) == (4, 1)
    assert (totals.fresh_tokens, totals.replay_tokens, totals.max_completion_tokens) == (22, 5, 8)
    masked = plan(groups, replays, [0.5], objective={"mask_truncated_completions": True}).totals
    assert (masked.fresh_sequences, masked.fresh_tokens, masked.replay_tokens) == (4, 6, 5)


def test_ages_are_in_policy_versions() -> None:
    replays = (
        *stored(("a", 1.0), versions=((2, 1), (4, 3))),
        *stored(("b", 0.0), versions=((6, 4),)),
    )
    assert plan(GROUPS, replays, [0.5, 0.5]).ages.tolist() == [4, 0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_completion_is_in_one_micro_batch_of_one_rank(ranks: int) -> None:
    result = plan(GROUPS, REPLAYS, BASELINES, ranks=ranks, micro_batch_tokens=30)
    assert len(result.shares) == ranks
    assert Counter(i for share in result.shares for batch in share for i in batch) == Counter(
        range(8)
    )
    alone = plan(GROUPS, REPLAYS, BASELINES, micro_batch_tokens=30)
    assert sorted(batch for share in result.shares for batch in share) == sorted(alone.shares[0])
    assert result.advantages.values.tolist() == alone.advantages.values.tolist()
    assert result.totals == alone.totals


def test_a_replay_shares_its_prompt_with_fresh_completions_only_when_equally_hinted() -> None:
    replays = (*stored(("a", 1.0)), *stored(("a", 1.0), hinted=True))
    result = plan(GROUPS[:1], replays, [0.5, 0.5], micro_batch_tokens=23)
    # 10 prompt tokens and 3 x 4 completion tokens fit 23; the hinted one brings another prompt.
    assert sorted(map(sorted, result.shares[0])) == [[0, 1, 2], [3]]


def test_a_step_that_lost_all_its_groups_is_an_empty_plan() -> None:
    result = plan([], (), [], ranks=2)
    assert result.trajectories == [] and result.shares == [[], []]
    assert len(result.advantages.values) == 0


def test_groups_of_any_size_train_together_and_one_of_a_single_member_teaches_nothing() -> None:
    """Completions may have been masked or empty, and a recipe's group size may change between
    runs."""
    groups = [group(0, "a", [1.0, 0.0, 0.0]), group(1, "b", [0.7]), group(2, "c", [1.0, 0.0])]
    result = plan(groups, (), [], ranks=2)
    values = result.advantages.values.tolist()
    assert values[3] == 0.0 and all(value != 0 for value in values[:3] + values[4:])
    assert sum(values[:3]) == pytest.approx(0) and values[4:] == pytest.approx([HALF, -HALF])
    assert result.advantages.dead_before.tolist() == [False, True, False]
    assert (
        result.totals.fresh_sequences == 6
    )  # the lone one counts, so that masking changes no other one's weight


@pytest.mark.parametrize("stored_now", [0, 1, 9])
def test_fewer_or_more_replays_than_asked_for(stored_now: int) -> None:
    """All evicted, some evicted, or more than the fresh ones: the fresh advantages stay what they
    are."""
    replays = stored(*[("b", float(i % 2)) for i in range(stored_now)])
    result = plan(GROUPS, replays, [0.5] * stored_now)
    assert result.advantages.values[:4].tolist() == pytest.approx([HALF, -HALF, 0, 0])
    assert result.totals.replay_sequences == stored_now == len(result.ages)
    assert Counter(i for batch in result.shares[0] for i in batch) == Counter(range(4 + stored_now))


def test_completions_of_one_token() -> None:
    result = plan([group(0, "a", [1.0, 0.0], tokens=1)], stored(("b", 1.0), tokens=1), [0.5])
    assert (result.totals.fresh_tokens, result.totals.replay_tokens) == (2, 1)
    assert result.advantages.values.tolist() == pytest.approx([HALF, -HALF, 0.5])


def test_every_update_of_a_step_has_all_groups_and_its_own_replays() -> None:
    work = StepWork(6, 6, tuple(GROUPS), REPLAYS, tuple(BASELINES), (0.5, 0.25))
    parts = [work.update(number, 3) for number in range(3)]
    assert [part.groups for part in parts] == [tuple(GROUPS)] * 3
    assert [part.replays for part in parts] == [
        (REPLAYS[0], REPLAYS[3]),
        (REPLAYS[1],),
        (REPLAYS[2],),
    ]
    assert [part.baselines for part in parts] == [(0.25, 0.1), (0.5,), (0.75,)]
    assert work.update(0, 1) == work


def test_fresh_vcrs_takes_the_average_of_the_groups_prompt() -> None:
    work = StepWork(6, 6, tuple(GROUPS), (), (), (0.5, 0.25))
    config = LearnerConfig(objective=ObjectiveConfig(fresh_advantage="vcrs"))
    found = plan_step(work, config, ranks=1, max_tokens=8).advantages
    sigma = np.sqrt((0.5**2 + 0.5**2) / 3)  # of 1, 0, 0.5, 0.5
    np.testing.assert_allclose(found.values, np.array([0.5, -0.5, 0.25, 0.25]) / sigma, rtol=1e-9)
    assert found.dead_before.tolist() == [False, True] and found.dead_after.tolist() == [
        False,
        False,
    ]


def test_a_step_that_fits_one_pack_is_shared_by_the_ranks() -> None:
    """One pack of all eight completions would leave three of four ranks without work."""
    shares = plan(GROUPS, REPLAYS, BASELINES, ranks=4).shares
    assert all(shares) and sorted(i for packs in shares for p in packs for i in p) == list(range(8))
    assert [len(packs) for packs in plan(GROUPS, REPLAYS, BASELINES, ranks=1).shares] == [1]


def test_completions_that_cannot_change_the_gradient_are_in_no_share() -> None:
    work = StepWork(6, 6, tuple(GROUPS), REPLAYS[:2], (0.25, 0.0))
    whole, kept = (
        plan_step(work, LearnerConfig(), ranks=1, max_tokens=8, only_advantages=only)
        for only in (False, True)
    )
    # the group "b" is all alike, and the replay of "c" got what its prompt gets on average
    assert sorted(whole.shares[0][0]) == [0, 1, 2, 3, 4, 5]
    assert sorted(kept.shares[0][0]) == [0, 1, 4]
    assert kept.totals == whole.totals and kept.trajectories == whole.trajectories
    assert kept.advantages.values.tolist() == whole.advantages.values.tolist()
    dead = StepWork(6, 6, (GROUPS[1],), (), ())
    none = plan_step(dead, LearnerConfig(), ranks=2, max_tokens=8, only_advantages=True)
    assert none.shares == [[], []] and len(none.trajectories) == 2
