"""Which prompts a step asks: in turn, or those with most left to learn; and what an evaluation
asks."""

from __future__ import annotations

from collections import Counter

import pytest

from avatar_rl.cluster.config import LoopConfig
from avatar_rl.cluster.training.prompt_schedule import (
    PromptSchedule,
    evaluation_requests,
    open_prompts,
)

IDS = [f"p{i}" for i in range(6)]


def schedule(**loop: object) -> PromptSchedule:
    return PromptSchedule(
        IDS, LoopConfig.model_validate({"fresh": 2, "replayed": 0, **loop}), seed=3, warm_up=0
    )


def test_epochs_ask_every_prompt_once_each() -> None:
    asked = [
        request for step in range(3) for request in schedule(prompts_per_step=4).requests(step)
    ]
    assert [request.seq for request in asked] == list(range(12))
    assert Counter(request.prompt_id for request in asked) == dict.fromkeys(IDS, 2)
    assert [request.epoch for request in asked] == [0] * 6 + [1] * 6


def test_open_asks_unknown_prompts_before_known_ones() -> None:
    requests = schedule(prompts_per_step=3, schedule="open").requests(
        0, {"p0": -0.5, "p2": 0.0, "p4": 1.0}
    )
    assert {request.prompt_id for request in requests} == {"p1", "p3", "p5"}
    assert [request.seq for request in requests] == [0, 1, 2] and {
        request.n for request in requests
    } == {2}


def test_open_prompts_are_drawn_by_the_reward_they_miss() -> None:
    # Weights 0.02, 0.52 and 1.02: drawn one at a time, they come in these proportions.
    missing = {"p0": 0.0, "p1": 0.5, "p2": 1.0}
    drawn = Counter(open_prompts(IDS[:3], missing, 1, seed=0, step=step)[0] for step in range(4000))
    for prompt_id, weight in (("p0", 0.02), ("p1", 0.52), ("p2", 1.02)):
        assert drawn[prompt_id] / 4000 == pytest.approx(weight / 1.56, abs=0.03)


def test_open_prompts_are_a_function_of_seed_step_and_averages() -> None:
    missing = dict.fromkeys(IDS, 0.5)
    first = open_prompts(IDS, missing, 4, seed=1, step=2)
    assert first == open_prompts(IDS, missing, 4, seed=1, step=2) and len(set(first)) == 4
    assert any(first != open_prompts(IDS, missing, 4, seed=1, step=step) for step in range(3, 6))


def test_open_goes_round_again_when_a_step_is_larger_than_the_pool() -> None:
    assert sorted(open_prompts(IDS[:2], {}, 4, seed=0, step=0)) == ["p0", "p0", "p1", "p1"]


def test_a_reward_above_the_full_one_still_leaves_a_prompt_a_chance() -> None:
    assert open_prompts(["p0"], {"p0": -3.0}, 1, seed=0, step=0) == ["p0"]


def test_evaluation_asks_each_prompt_for_as_many_samples() -> None:
    requests = evaluation_requests(IDS[:2], round=7, min_version=3, samples=4)
    assert [(t.prompt_id, t.n, t.kind, t.round, t.min_version) for t in requests] == [
        ("p0", 4, "eval", 7, 3),
        ("p1", 4, "eval", 7, 3),
    ]


def test_spares_are_other_prompts_under_the_next_numbers() -> None:
    ids = [f"p{i}" for i in range(24)]
    for kind in ("epochs", "open"):
        loop = LoopConfig.model_validate(
            {"prompts_per_step": 4, "schedule": kind, "dynamic_sampling": {"attempts": 3}}
        )
        plan = PromptSchedule(ids, loop, seed=3, warm_up=0, first_seq=7)
        plain = PromptSchedule(
            ids, LoopConfig(prompts_per_step=4, schedule=kind), seed=3, warm_up=0
        )
        for step in range(3):
            asked = plan.requests(step, {})
            assert [r.seq for r in asked] == [9 + 3 * (4 * step + i) for i in range(4)]
            first = [r.prompt_id for r in asked]
            assert first == [r.prompt_id for r in plain.requests(step, {})]  # spares change nothing
            everything = [*first, *(spare for r in asked for spare in r.spares)]
            assert len(set(everything)) == 12
    assert all(not r.spares for r in plain.requests(0, {}))


def test_a_pool_that_is_too_small_for_spares_repeats_prompts() -> None:
    plan = schedule(prompts_per_step=4, dynamic_sampling={"attempts": 5})
    assert [len(request.spares) for request in plan.requests(0)] == [4] * 4
