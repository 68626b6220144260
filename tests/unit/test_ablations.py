"""The ablations' arithmetic: intervals, changes per seed, solved prompts, and which records are of
other settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from benchmarks.ablations import RECIPE, configure, digest_of, stale
from benchmarks.studies.ablation_arms import (
    ARMS,
    BASE,
    COMPLETIONS,
    GROUPS,
    SEEDS,
    SOLVED,
    measured_every,
)
from benchmarks.studies.ablation_report import area, changes, half_width, solved_at, tables
from benchmarks.studies.arms import POOL
from benchmarks.studies.runs import Ground, solved_curve
from tests.unit.test_study import record


def level(arm: str, seed: int, accuracy: float) -> dict[str, object]:
    """A run whose accuracy stands still."""
    return record(arm, seed, (0, accuracy), (COMPLETIONS, accuracy))


def ground(raw: dict[str, object]) -> Ground:
    at = Path("nowhere")
    return Ground(raw, at, Path("untrained"), at, at, at)


@pytest.fixture(scope="module")
def raw() -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(RECIPE.read_text())
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe_of_as_many_completions(arm: str, raw: dict[str, object]) -> None:
    config = configure(ground(raw), arm, 0, Path("cache"), COMPLETIONS)
    per_step = config.loop.prompts_per_step * config.loop.fresh
    assert COMPLETIONS <= config.loop.steps * per_step < COMPLETIONS + per_step
    assert config.loop.steps % measured_every(ARMS[arm]) == 0  # measured at its end
    assert config.output.samples >= config.loop.prompts_per_step == 8
    assert (config.model.path == "untrained") == arm.endswith("no SFT")


def test_the_reward_arms_add_one_thing_each(raw: dict[str, object]) -> None:
    found = [
        configure(ground(raw), name, 0, Path("c"), COMPLETIONS)
        for _, name in GROUPS["rewards, cumulative"]
    ]
    weights = [set(one.rewards.weights) for one in found]
    assert weights[0] < weights[1] < weights[2] == weights[3]
    baselines = [one.learner.objective.replay_advantage for one in found]
    assert baselines == ["batch_mean"] * 3 + ["vcrs"]


def test_every_group_and_curve_is_of_known_arms() -> None:
    shown = {name for rows in GROUPS.values() for _, name in rows}
    assert shown == set(ARMS) and set(SOLVED) <= set(ARMS) and BASE in ARMS and len(SEEDS) >= 5


def test_the_interval_of_a_mean_is_students() -> None:
    # sd 1, n 3: 4.303 / sqrt(3). Of two values the half width is 12.706 times half their distance.
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=1e-3)
    assert half_width([0.0, 1.0]) == pytest.approx(6.353, abs=1e-3)
    assert math.isinf(half_width([1.0])) and math.isinf(half_width([0.0] * 12))


def test_changes_are_taken_per_seed() -> None:
    flat = [level("a", seed, 0.2 + seed / 10) for seed in (0, 1)]
    other = [level("b", seed, 0.3) for seed in (1, 2)]
    assert area(flat[1]) == pytest.approx(0.3)
    assert changes(other, flat) == [pytest.approx(0.0)]  # seed 2 has no partner


def test_solved_prompts_are_counted_once_and_as_they_come() -> None:
    rows = [{"step": 0, "completions/generated": 8}, {"step": 1, "completions/generated": 16}]
    right, wrong = {"accuracy": 1.0}, {"accuracy": 0.0}
    samples = {
        0: [{"prompt_id": "a", "components": right}, {"prompt_id": "b", "components": wrong}],
        1: [{"prompt_id": "a", "components": right}, {"prompt_id": "b", "components": right}],
    }
    curve = solved_curve([*rows, {"step": 2, "pool/accuracy": 0.5}], samples)
    assert curve == [[8, 1], [16, 2]] and solved_curve(rows, {}) == []
    one = {"solved": curve}
    assert solved_at(one, 8) == 1 / POOL.train and solved_at(one, 7) == 0


def test_records_of_other_settings_are_named() -> None:
    def made(digest: str) -> dict[str, object]:
        return record(BASE, 0, (0, 0.3), (COMPLETIONS, 0.5)) | {"digest": digest, "commit": "abc"}

    [named] = stale([made("of another recipe")])
    assert named == "avatar seed 0 (commit abc)"


def test_the_digest_is_of_what_the_recipe_says(raw: dict[str, object]) -> None:
    def of(arm: str, seed: int = 0, start: str = "s", **over: object) -> str:
        made = ground({**raw, **over})
        config = configure(made, arm, seed, Path("cache"), COMPLETIONS)
        return digest_of(config, ground=made, pool=POOL, start=start)

    first = of(BASE)
    assert first == of(BASE, seed=1) and first != of("lambda 2") and first != of(BASE, start="t")
    assert of(BASE, evaluation={"every": 7, "limit": 3}) != first
    assert of("avatar, no SFT", start="t") == of("avatar, no SFT")  # no start to depend on


def test_the_tables_mark_what_is_not_significant() -> None:
    runs = {
        "grpo": [level("grpo", seed, 0.2 + seed / 100) for seed in range(3)],
        "tas_only": [level("tas_only", seed, 0.4 + seed / 100) for seed in range(3)],
        "avatar": [level("avatar", seed, 0.2 + seed / 10) for seed in range(3)],
    }
    [method, *_] = tables(runs).split("\n\n")
    rows = {line.split(" | ")[0].strip("| "): line for line in method.splitlines()[2:]}
    assert "+0.200 |" in rows["tas_only"] and "†" not in rows["tas_only"]
    assert "†" in rows["avatar"] and rows["grpo"].count("†") == 0
