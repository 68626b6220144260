"""Advantages against hand-computed values and the statistics module."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.learner.objective.advantages import (
    group_advantages,
    replay_advantages,
    rewards_tensor,
    step_advantages,
)

NAN = float("nan")


def test_group_advantages_by_hand() -> None:
    # Mean 0.5, deviation with n - 1 = sqrt(1/3).
    found = group_advantages(rewards_tensor([1, 0, 0, 1]), torch.zeros(4, dtype=torch.int64))
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert found.tolist() == pytest.approx([expected, -expected, -expected, expected], abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_ragged_interleaved_groups(scale: str) -> None:
    rewards, groups = [0.9, 0.1, 0.4, 0.3, 0.8, 0.2, 0.7], [7, 3, 7, 3, 7, 3, 3]
    found = group_advantages(rewards_tensor(rewards), torch.tensor(groups), scale)  # type: ignore[arg-type]
    for row, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        mates = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        divisor = {
            "group": statistics.stdev(mates) + 1e-4,
            "batch": statistics.stdev(rewards) + 1e-4,
            "none": 1.0,
        }[scale]
        assert found[row].item() == pytest.approx(
            (reward - statistics.mean(mates)) / divisor, abs=1e-12
        )


def test_masked_rewards_take_no_part() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1])
    found = group_advantages(rewards_tensor([1, None, 0, 0.5, None]), groups)
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert found.tolist() == pytest.approx([expected, 0, -expected, 0, 0], abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_of_one_and_equal_rewards_give_exactly_zero(scale: str) -> None:
    groups = torch.tensor([0, 1, 1, 1])
    found = group_advantages(rewards_tensor([0.7, 0.1, 0.1, 0.1]), groups, scale)  # type: ignore[arg-type]
    assert found.tolist() == [0, 0, 0, 0]


def test_vcrs_divides_by_the_deviation_of_the_replayed_rewards() -> None:
    rewards, baselines = [1.0, 0.0, 1.0, 0.5], [0.25, 0.5, 0.75, 0.5]
    sigma = statistics.stdev(rewards)
    found = replay_advantages(rewards_tensor(rewards), torch.tensor(baselines, dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.75 / sigma, -0.5 / sigma, 0.25 / sigma, 0], abs=1e-12)


def test_vcrs_floor_and_equal_rewards() -> None:
    baselines = torch.tensor([0.2, 0.2], dtype=torch.float64)
    assert replay_advantages(rewards_tensor([0.50, 0.52]), baselines).tolist() == pytest.approx(
        [3.0, 3.2]
    )
    assert replay_advantages(rewards_tensor([0.5, 0.5]), baselines).tolist() == pytest.approx(
        [0.3, 0.3]
    )
    assert replay_advantages(rewards_tensor([1.0]), baselines[:1]).tolist() == pytest.approx([0.8])


def test_batch_mean_is_the_ablation() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0]
    found = replay_advantages(rewards_tensor(rewards), None)
    unit = 0.5 / statistics.stdev(rewards)
    assert found.tolist() == pytest.approx([unit, -unit, -unit, unit])
    assert replay_advantages(rewards_tensor([0.3, 0.3, 0.3]), None).tolist() == [0, 0, 0]


def test_replayed_masked_reward_is_left_out_of_sigma() -> None:
    baselines = torch.tensor([0.0, NAN, 0.0], dtype=torch.float64)
    found = replay_advantages(rewards_tensor([1.0, None, 0.0]), baselines)
    assert found.tolist() == pytest.approx([1 / math.sqrt(0.5), 0, 0])
    assert replay_advantages(rewards_tensor([None, None]), baselines[:2]).tolist() == [0, 0]


def step(mode: str) -> tuple[torch.Tensor, ...]:
    """Two mixed groups of 2 fresh and 2 replayed; group 1 is dead when fresh, one replay answers
    its own prompt."""
    rewards = rewards_tensor([1, 0, 1, 0, 0, 0, 1, 1])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    is_replay = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    baselines = torch.full((8,), 0.5, dtype=torch.float64)
    same = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0], dtype=torch.bool)
    found = step_advantages(rewards, groups, is_replay, baselines, same, replay_advantage=mode)  # type: ignore[arg-type]
    return found.values, found.scored, found.dead_before, found.dead_after


def test_step_mixes_fresh_and_replayed() -> None:
    values, scored, before, after = step("vcrs")
    fresh = 0.5 / (math.sqrt(0.5) + 1e-4)
    replayed = 0.5 / statistics.stdev([1, 0, 1, 1])
    expected = [fresh, -fresh, replayed, -replayed, 0, 0, replayed, replayed]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    assert scored.all()
    assert before.tolist() == [False, True]
    assert after.tolist() == [False, False]


def test_joint_normalises_fresh_with_replays_of_the_same_prompt() -> None:
    values = step("joint")[0]
    mates = [0, 0, 1]  # group 1: two fresh failures and the stored success of the same prompt
    unit = 1 / (statistics.stdev(mates) + 1e-4)
    assert values[[4, 5, 6]].tolist() == pytest.approx(
        [-unit / 3, -unit / 3, 2 * unit / 3], abs=1e-12
    )
    assert values[[0, 1, 2, 3, 7]].tolist() == pytest.approx(
        step("vcrs")[0][[0, 1, 2, 3, 7]].tolist()
    )


def test_joint_without_a_scored_fresh_row_keeps_vcrs() -> None:
    rewards = rewards_tensor([None, 1.0, 0.0])
    found = step_advantages(
        rewards,
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([False, True, True]),
        torch.full((3,), 0.5, dtype=torch.float64),
        torch.tensor([False, True, True]),
        replay_advantage="joint",
    )
    unit = 0.5 / statistics.stdev([1, 0])
    assert found.values.tolist() == pytest.approx([0, unit, -unit])
    assert found.scored.tolist() == [False, True, True]
    assert found.dead_before.tolist() == [True]
    assert found.dead_after.tolist() == [False]


def test_dead_after_mixing_when_replays_teach_nothing_either() -> None:
    found = step_advantages(
        rewards_tensor([1.0, 1.0, 0.5]),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([False, False, True]),
        torch.full((3,), 0.5, dtype=torch.float64),
    )
    assert found.dead_before.tolist() == [True]
    assert found.dead_after.tolist() == [True]


def test_bad_input_is_a_typed_error() -> None:
    groups = torch.zeros(2, dtype=torch.int64)
    rewards, replay = rewards_tensor([1.0, 0.0]), torch.tensor([False, True])
    with pytest.raises(DataError, match=r"rows \[1\] are infinite"):
        rewards_tensor([0.0, math.inf])
    with pytest.raises(DataError, match=r"rows \[0\] are infinite"):
        group_advantages(torch.tensor([math.inf, 0]), groups)
    with pytest.raises(ConfigError, match="scale_rewards 'max'"):
        group_advantages(rewards, groups, "max")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="baseline"):
        step_advantages(rewards, groups, replay)
    with pytest.raises(DataError, match=r"rows \[0\] have no finite baseline"):
        step_advantages(rewards, groups, replay, torch.tensor([0.0, NAN]))
    with pytest.raises(DataError, match="same_prompt"):
        step_advantages(rewards, groups, replay, rewards, replay_advantage="joint")
    with pytest.raises(DataError, match="groups has shape"):
        step_advantages(rewards, groups[:1], replay)


def test_a_fresh_completion_alone_learns_against_its_prompts_average() -> None:
    rewards, baselines = [1.0, 0.0, 0.5, 1.0], [0.25, 0.25, 0.5, 0.75]
    found = step_advantages(
        rewards_tensor(rewards),
        torch.tensor([0, 1, 2, 2]),
        torch.tensor([False, False, False, True]),
        torch.tensor(baselines, dtype=torch.float64),
        fresh_advantage="vcrs",
    )
    sigma = statistics.stdev(rewards)  # of the whole step: fresh and replayed share one scale
    assert found.values.tolist() == pytest.approx(
        [0.75 / sigma, -0.25 / sigma, 0, 0.25 / sigma], abs=1e-12
    )
    assert (
        found.dead_before.tolist() == [True, True, True]
        and found.dead_after.tolist() == [False] * 3
    )


def test_positive_replay_keeps_fresh_failures_and_drops_replayed_ones() -> None:
    rewards, baselines = rewards_tensor([1, 0, 1, 0]), torch.full((4,), 0.5, dtype=torch.float64)
    is_replay, groups = torch.tensor([False, False, True, True]), torch.zeros(4, dtype=torch.int64)
    both = step_advantages(rewards, groups, is_replay, baselines).values
    positive = step_advantages(rewards, groups, is_replay, baselines, replay_sign="positive").values
    assert both[3] < 0 and positive.tolist() == [*both[:3].tolist(), 0]


def test_fresh_vcrs_needs_baselines() -> None:
    with pytest.raises(DataError, match="baseline"):
        step_advantages(
            rewards_tensor([1.0]),
            torch.tensor([0]),
            torch.tensor([False]),
            None,
            fresh_advantage="vcrs",
        )
