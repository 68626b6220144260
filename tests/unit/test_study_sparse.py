"""The sparse study: what is fixed, what is refused, and how censored and crashed runs count."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from avatar_rl.cluster.recipe.overlays import Overlay
from avatar_rl.common.files import read_jsonl, sha256_of
from avatar_rl.prompts.synthetic.config import Category
from benchmarks.studies.habits import Habits
from benchmarks.studies.runs import RECORDS, Ground, Records, perform_all, recipe_digest
from benchmarks.studies.sparse_arms import (
    ARMS,
    CANDIDATES,
    CAP,
    GRPO_ARMS,
    HABITS,
    MEASURE,
    POOL,
    RATIOS,
    RECIPE,
    REPORT_SEEDS,
    TUNING_SEEDS,
    ground_of,
    protocol,
)
from benchmarks.studies.sparse_report import (
    alike,
    best,
    compare,
    dead_over_time,
    flat,
    in_order,
    tables,
)
from benchmarks.study_sparse import configure, refuse_solved, stale, take_kept
from tests.unit.test_study import record

AT = Path("nowhere")
GROUND = Ground(RECIPE, AT, AT, AT, AT, AT)


def run(arm: str, seed: int, passes: float) -> dict[str, Any]:
    """A run from 0.03 that is at 0.9 after ``passes`` completions, if it ever is."""
    end = (passes, 0.9) if math.isfinite(passes) else (CAP, 0.2)
    return record(arm, seed, (0, 0.03), end) | {
        "hinted": 0.0,
        "dead_curve": [[64.0, 0.9], [512.0, 0.4]],
        "commit": "abc",
    }


def arms(**passes: list[float]) -> list[dict[str, Any]]:
    names = {"plus": "avatar_plus", "grpo": "grpo@4e-4", "slow": "grpo@2e-4"}
    return [
        run(names[name], seed, value)
        for name, values in passes.items()
        for seed, value in enumerate(values)
    ]


def test_the_protocol_is_kept() -> None:
    assert not set(TUNING_SEEDS) & set(REPORT_SEEDS) and len(REPORT_SEEDS) >= 5
    assert len(GRPO_ARMS) >= 3 and len(alike("avatar")) == len(alike("avatar_no_hint")) == 2
    assert POOL >= 48 and POOL % len(HABITS.answers) == 0
    assert all(alike(name) for pair in RATIOS.values() for name in pair)


@pytest.mark.parametrize("arm", [*ARMS, *CANDIDATES])
def test_every_arm_has_the_same_cap_and_is_measured_as_often(arm: str) -> None:
    config = configure(GROUND, arm, 0, AT)
    per_step = config.loop.prompts_per_step * config.loop.fresh
    assert CAP <= config.loop.steps * per_step < CAP + per_step
    assert config.evaluation.pool.every * per_step == MEASURE
    assert config.loop.max_staleness == 0 and config.rewards.numeric == "exact"


def test_the_digest_follows_arm_and_ground() -> None:
    config = configure(GROUND, "grpo@4e-4", 0, AT)
    own = recipe_digest(config, ground_of())
    assert own == recipe_digest(configure(GROUND, "grpo@4e-4", 1, Path("b")), ground_of())
    assert own != recipe_digest(configure(GROUND, "grpo@2e-4", 0, AT), ground_of())
    assert own != recipe_digest(config, ground_of(pool=24))
    known = run("grpo@4e-4", 0, 64) | {"digest": own}
    assert stale([known]) == []
    assert stale([known | {"digest": "other"}]) == ["grpo@4e-4 seed 0 (commit abc)"]


def test_a_study_is_not_resumed_with_another_protocol_or_start(tmp_path: Path) -> None:
    records = Records(tmp_path / "runs.jsonl")
    fields = {"protocol": protocol(), "start": "aaa"}
    records.add(run("avatar_plus", 0, 64) | {"digest": "d", **fields})
    records.refuse_others(fields)
    for name in fields:
        with pytest.raises(SystemExit, match=rf"avatar_plus seed 0 .* has {name} .*--records FILE"):
            records.refuse_others(fields | {name: "other"})


def test_a_pool_that_the_start_solves_is_refused() -> None:
    refuse_solved([run("avatar_plus", 0, 64)])
    easy = [record("avatar_plus", 0, (0, 0.4), (64, 0.9))]
    with pytest.raises(SystemExit, match=r"answers 0\.400 of the pool"):
        refuse_solved(easy)


def test_a_crashed_run_is_recorded_counted_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(GROUND, "avatar_plus", 0, AT)
    monkeypatch.setattr("benchmarks.studies.runs.sys.executable", "/bin/false")
    records = Records(tmp_path / "runs.jsonl")

    def attempt() -> list[str]:
        return perform_all(
            [("avatar_plus", 0, config)], records, 1, lambda _: "d", keep_crashes=True
        )

    assert attempt() == attempt() == ["avatar_plus seed 0"]
    lines = [json.loads(line) for line in records.path.read_text().splitlines()]
    assert len(lines) == 2 and "ended with 1" in lines[0]["crashed"]
    [crashed] = Records(records.path).all()
    study = in_order([crashed, run("avatar_plus", 1, 640)])
    figures = flat(study)
    assert figures["crashed_avatar_plus"] == 1 and figures["censored_share_avatar_plus"] == 0.5
    assert "not reached, 640" in tables(study)


def test_nothing_is_begun_after_the_minutes(tmp_path: Path) -> None:
    records = Records(tmp_path / "runs.jsonl")
    config = configure(GROUND, "avatar_plus", 0, AT)
    assert perform_all([("avatar_plus", 0, config)], records, 1, lambda _: "d", minutes=-1) == []
    assert not records.path.exists()


def test_a_censored_arm_gives_a_bound() -> None:
    study = in_order(arms(grpo=[math.inf] * 2 + [2048], plus=[256, 512, 1024]))
    one = compare(study, "grpo", "avatar_plus")
    assert one is not None and one.over_censored and not one.under_censored
    assert one.value == CAP / 512 and one.low <= one.value <= one.high
    figures = flat(study)
    assert figures["completions_ratio_at_least"] == 1
    assert figures["grpo_censored_share"] == pytest.approx(2 / 3)
    assert ">= 6.00" in tables(study)


def test_nothing_is_known_where_neither_arm_gets_there() -> None:
    study = in_order(arms(grpo=[math.inf], plus=[math.inf]))
    assert "completions_ratio" not in flat(study) and "| unknown |" in tables(study)


def test_few_seeds_have_no_interval_and_say_so() -> None:
    study = in_order(arms(grpo=[1024, 1024], plus=[512, 512]))
    assert flat(study)["completions_ratio"] == 2 and "ratio_low" not in flat(study)
    assert "| 2.00 | fewer than 3 seeds | 2 |" in tables(study)


def test_grpo_counts_with_its_best_rate() -> None:
    study = in_order(arms(grpo=[1024, 1024, math.inf], slow=[512, math.inf, math.inf], plus=[64]))
    assert best(study, "grpo") == "grpo@4e-4"
    assert best(study, "fifo") is None and compare(study, "fifo", "avatar_plus") is None


def test_a_run_that_passes_after_the_cap_is_censored() -> None:
    study = in_order([run("grpo_sampling@4e-4", 0, CAP + 1)])
    assert flat(study)["censored_share_grpo_sampling_lr_4em4"] == 1


def test_dead_groups_are_told_by_stretch() -> None:
    assert dead_over_time([run("avatar_plus", 0, 64)]) == [0.9, 0.4, None, None]


def test_habits_are_taught_where_nothing_is_shown_and_never_right_in_the_pool() -> None:
    habits = Habits({Category.LOCALISE: "Left: low / Right: high"})
    row: Overlay = {
        "category": "localise",
        "answer": "Left: mid / Center: low",
        "reasoning": "look",
        "extra": {"scene": "s"},
    }
    taught = [habits.taught(number, row) for number in range(100)]
    assert sum("hinted" in one["extra"] for one in taught) == 50
    looked = [one for one in taught if one["reasoning"] == "look" and "hinted" not in one["extra"]]
    assert len(looked) == 2 and taught[3]["answer"] == "Left: low / Right: high"
    assert habits.taught(3, row | {"category": "pitch"})["reasoning"] == "look"
    assert habits.fails(row)
    assert not habits.fails(row | {"answer": "Left: low / Center: mid"})


def test_the_records_began_with_the_cold_start_that_is_kept(tmp_path: Path) -> None:
    [kept] = (RECORDS / "starts").iterdir()
    wanted = tmp_path / kept.name
    take_kept(wanted)
    found = sha256_of(wanted / "model.safetensors")[:12]
    records = list(read_jsonl(RECORDS / "study_sparse.jsonl"))
    assert records and {one["start"] for one in records} == {found}
    (wanted / "mine").touch()
    take_kept(wanted)  # what is there stays
    assert (wanted / "mine").exists()
    take_kept(tmp_path / "cold-start-another")
    assert not (tmp_path / "cold-start-another").exists()
