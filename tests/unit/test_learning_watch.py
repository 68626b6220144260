"""A run that cannot learn says so and ends; one that learns little is warned of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.training.learning_watch import (
    ALIKE_STEPS,
    EMPTY_STEPS,
    MASKED_STEPS,
    WARN_STEPS,
    LearningWatch,
)
from avatar_rl.common.errors import NothingLearntError

FINE = {
    "groups/fresh": 4.0,
    "completions/truncated_share": 0.1,
    "reward/format": 0.5,
    "reward/std": 0.3,
    "masked/judge": 0.0,
}


class Watched:
    """A watch over a buffer with these quarantined prompts, and what it has said."""

    def __init__(self, **config: Any) -> None:
        self.reasons: dict[str, str] = {}
        self.said: list[tuple[str, str]] = []
        buffer: Any = SimpleNamespace(requests=SimpleNamespace(quarantined=lambda: self.reasons))
        rewards = {"weights": {"format": 0.5, "accuracy": 0.5, **config.pop("weights", {})}}
        rewards["judge"] = {"kind": "rule"}
        recipe = RunConfig.model_validate(
            {"model": {"path": "tiny"}, "data": {"synthetic": {}}, "rewards": rewards, **config}
        )
        self.watch = LearningWatch(recipe, buffer, lambda *said: self.said.append(said))

    def step(
        self, prompts: int = 0, dropped: dict[str, int] | None = None, **change: float
    ) -> None:
        ledger = SimpleNamespace(dropped=dropped or {})
        stats: Any = SimpleNamespace(
            prompts=prompts, quarantined_prompts=len(self.reasons), ledger=ledger
        )
        metrics = FINE | {name.replace("__", "/"): value for name, value in change.items()}
        self.watch.look(metrics, stats)

    def set_aside(self, count: int, why: str) -> None:
        for number in range(count):
            self.reasons[f"p{len(self.reasons)}"] = why.format(n=number)


WHY = "DataError: prompt 'p{n}' has {n}75 tokens: 75 prompt tokens + max_tokens 4096 exceed"


def test_a_healthy_run_hears_nothing() -> None:
    watched = Watched()
    for _ in range(40):
        watched.step(prompts=100)
    assert watched.said == []


def test_more_prompts_set_aside_than_the_limit_end_the_run_with_the_reason() -> None:
    watched = Watched()
    watched.set_aside(213, WHY)
    with pytest.raises(
        NothingLearntError,
        match=r"213 of 256 prompts set aside: .*exceed.*quarantine_limit 0\.2.*data validate",
    ):
        watched.step(prompts=43)


@pytest.mark.parametrize(
    ("aside", "asked", "ends"), [(31, 0, False), (32, 96, True), (32, 200, False)]
)
def test_the_limit_counts_from_32_prompts_on(aside: int, asked: int, ends: bool) -> None:
    watched = Watched()
    watched.set_aside(aside, WHY)
    if ends:
        with pytest.raises(NothingLearntError):
            watched.step(prompts=asked)
    else:
        watched.step(prompts=asked)
        assert [kind for kind, _ in watched.said] == ["prompts set aside"]


def test_prompts_set_aside_are_said_in_one_line_and_again_when_they_doubled() -> None:
    watched = Watched()
    for _ in range(4):
        watched.set_aside(1, WHY)
        watched.step(prompts=300)
    assert [message.partition(":")[0] for _, message in watched.said] == [
        "1 of 301 prompts set aside",
        "2 of 302 prompts set aside",
        "4 of 304 prompts set aside",
    ]
    watched.set_aside(2, "DataError: /data/a{n}.mp4: cannot be decoded")
    watched.set_aside(2, WHY)
    watched.step(prompts=300)
    assert "6 times" in watched.said[-1][1] and "2 times DataError: FILE" in watched.said[-1][1]


def test_steps_without_a_group_end_the_run() -> None:
    watched = Watched()
    watched.set_aside(8, WHY)
    for _ in range(EMPTY_STEPS - 1):
        watched.step(prompts=0, groups__fresh=0.0)
    watched.step(groups__fresh=1.0)  # one with a group begins the count anew
    for _ in range(EMPTY_STEPS - 1):
        watched.step(groups__fresh=0.0)
    with pytest.raises(NothingLearntError, match=r"last 3 steps had no group .*exceed"):
        watched.step(groups__fresh=0.0)


@pytest.mark.parametrize("steps", range(1, EMPTY_STEPS))
def test_a_short_run_without_any_group_ends_as_one_that_learnt_nothing(steps: int) -> None:
    watched = Watched()
    watched.set_aside(2, WHY)
    for _ in range(steps):
        watched.step(groups__fresh=0.0)
    with pytest.raises(NothingLearntError, match=rf"last {steps} steps had no group .*exceed"):
        watched.watch.end()


@pytest.mark.parametrize("steps", (1, MASKED_STEPS - 1))
def test_a_short_run_whose_reward_was_masked_throughout_ends_so(steps: int) -> None:
    watched = Watched(weights={"judge": 0.5})
    for _ in range(steps):
        watched.step(masked__judge=1.0)
    with pytest.raises(NothingLearntError, match=rf"reward judge had no mark .* of {steps} steps"):
        watched.watch.end()


def test_a_short_run_with_something_to_learn_from_ends_well() -> None:
    watched = Watched(weights={"judge": 0.5})
    watched.step(groups__fresh=0.0)
    watched.step(masked__judge=0.5)
    watched.step(masked__judge=1.0)
    watched.step(reward__std=0.0)
    watched.watch.end()
    assert watched.said == []


def test_a_short_run_whose_rewards_were_all_alike_says_so_at_its_end() -> None:
    watched = Watched()
    for _ in range(3):
        watched.step(reward__std=0.0)
    assert watched.said == []
    watched.watch.end()
    [(kind, message)] = watched.said
    assert kind == "warning" and message.startswith("for 3 steps all completions are paid alike")


def test_a_step_of_replay_alone_is_a_step() -> None:
    watched = Watched()
    for _ in range(2 * EMPTY_STEPS):
        watched.step(groups__fresh=0.0, replay__share=1.0)


def test_groups_that_nobody_could_score_end_the_run_by_the_judge() -> None:
    watched = Watched()
    with pytest.raises(NothingLearntError, match=r"12 groups dropped as unscored.*the judge"):
        for _ in range(EMPTY_STEPS):
            watched.step(groups__fresh=0.0, dropped={"unscored": 12, "empty": 0})


def test_a_reward_that_is_masked_from_the_start_ends_the_run() -> None:
    watched = Watched(weights={"judge": 0.4})
    with pytest.raises(NothingLearntError, match=r"reward judge had no mark .* of 8 steps"):
        for _ in range(MASKED_STEPS):
            watched.step(masked__judge=1.0)


def test_a_judge_that_fails_later_is_a_warning() -> None:
    watched = Watched(weights={"judge": 0.4})
    watched.step(masked__judge=0.5)
    for _ in range(3 * MASKED_STEPS):
        watched.step(masked__judge=1.0)
    assert len(watched.said) == 1 and "reward judge has no mark" in watched.said[0][1]


@pytest.mark.parametrize(
    ("change", "steps", "words"),
    [
        (
            {"completions__truncated_share": 1.0},
            WARN_STEPS,
            ("rollout.sampling.stop", "max_tokens"),
        ),
        ({"reward__format": -1.0}, WARN_STEPS, ("data.template.instruction", "cold start")),
        ({"reward__std": 0.0}, ALIKE_STEPS, ("paid alike",)),
        ({"judge__breaker_open": 1.0}, 1, ("circuit breaker is open", "endpoint", "cooldown_s")),
    ],
)
def test_what_lets_a_run_learn_little_is_said_once_with_a_remedy(
    change: dict[str, float], steps: int, words: tuple[str, ...]
) -> None:
    watched = Watched()
    for _ in range(steps - 1):
        watched.step(**change)
    assert watched.said == []
    watched.step(**change)
    watched.step(**change)
    [(kind, message)] = watched.said
    assert kind == "warning" and all(word in message for word in words)
    watched.step()  # over, and then back
    for _ in range(steps):
        watched.step(**change)
    assert len(watched.said) == 2
