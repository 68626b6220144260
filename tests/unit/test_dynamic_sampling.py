"""Which groups dynamic sampling replaces, what it refuses, and DAPO's overlong punishment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from avatar_rl.actors.groups import DeadBy, is_dead
from avatar_rl.buffer_service.records.trajectory import Group
from avatar_rl.cluster.recipe.load import check
from avatar_rl.common.errors import ConfigError
from avatar_rl.rewards.answers.overlong import overlong_score
from avatar_rl.rewards.config import RewardConfig


def group(*marks: tuple[float | None, float]) -> Group:
    members = [SimpleNamespace(components={"accuracy": a}, reward=r) for a, r in marks]
    return cast("Group", SimpleNamespace(trajectories=members))


@pytest.mark.parametrize(
    ("marks", "by", "dead"),
    [
        ([(1.0, 1.0), (1.0, 0.4)], "accuracy", True),  # format alone tells them apart
        ([(1.0, 1.0), (1.0, 0.4)], "reward", False),
        ([(0.0, 0.5), (0.0, 0.5)], "reward", True),
        ([(0.0, 0.5), (1.0, 0.5)], "accuracy", False),
        ([(None, 0.5), (1.0, 0.5)], "accuracy", True),  # unknown: by the reward
        ([(None, 0.4), (1.0, 0.5)], "accuracy", False),
    ],
)
def test_a_group_is_dead_where_nothing_tells_its_completions_apart(
    marks: list[tuple[float | None, float]], by: DeadBy, dead: bool
) -> None:
    assert is_dead(group(*marks), by) is dead


@pytest.mark.parametrize(
    "over",
    [
        {"loop": {"fresh": 1, "replayed": 7}},
        {"learner": {"objective": {"fresh_advantage": "vcrs"}}, "loop": {}},
    ],
)
def test_dynamic_sampling_is_refused_where_no_group_or_every_group_is_dead(over: Any) -> None:
    over["loop"]["dynamic_sampling"] = {"attempts": 2}
    with pytest.raises(ConfigError, match="attempts to 1"):
        check({"data": {"train": "x.jsonl"}, **over}, source="r")


@pytest.mark.parametrize(
    ("tokens", "score"), [(1, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0), (30000, -1.0)]
)
def test_overlong_is_the_papers_soft_punishment(tokens: int, score: float) -> None:
    """DAPO, arXiv 2503.14476: 16,384 expected tokens and a cache of 4,096."""
    assert overlong_score(tokens, limit=20480, share=0.2) == pytest.approx(score)


def test_full_reward_counts_what_a_component_can_pay() -> None:
    weights = {"accuracy": 1.0, "overlong": 0.5, "fusion": 1.0}
    assert RewardConfig(weights=weights).full_reward == pytest.approx(1.3)
