"""The length study: what its cold starts are taught, what its arms differ in, what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.synthetic.world import first_taught
from benchmarks.length import configure, length_of, stale
from benchmarks.studies.length_arms import (
    CELLS,
    COMPLETIONS,
    HONEST,
    MOST_TOKENS,
    RECIPE,
    SHAPES,
    TYPES,
    UNIFORM,
    WORLD,
    ground_of,
    protocol,
)
from benchmarks.studies.length_notes import PASSES, Fault, taught, with_reasoning
from benchmarks.studies.length_report import flat, gains, in_order, judged, tables
from benchmarks.studies.runs import RECORDS, Ground, recipe_digest

NOWHERE = Ground(RECIPE, *[Path("nowhere")] * 5)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row.prompt.model_dump(mode="json") for row in first_taught(WORLD, 80)]


def other_of(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """One of its type with another answer."""
    return next(
        other
        for other in rows
        if other["category"] == row["category"] and other["answer"] != row["answer"]
    )


def test_lengths_are_apart_and_below_the_cap(rows: list[dict[str, Any]]) -> None:
    counts = {
        length: [len(with_reasoning(row, row, length)["reasoning"].split()) for row in rows]
        for length in PASSES
    }
    for shorter, longer in (("short", "medium"), ("medium", "long")):
        assert max(counts[shorter]) < min(counts[longer])
    for length, found in counts.items():  # a word is at most two tokens, by and large
        assert max(found) < MOST_TOKENS[length]


@pytest.mark.parametrize("length", PASSES)
def test_honest_reasoning_leads_to_the_answer(rows: list[dict[str, Any]], length: str) -> None:
    for row in rows:
        made = with_reasoning(row, other_of(rows, row), length)
        assert made["answer"] == row["answer"] and row["question"] in made["reasoning"]
        assert made["reasoning"].endswith(row["reasoning"].rpartition("so ")[2])


@pytest.mark.parametrize("length", PASSES)
def test_each_fault_is_wrong_in_its_own_third(rows: list[dict[str, Any]], length: str) -> None:
    for row in rows:
        other = other_of(rows, row)
        honest = with_reasoning(row, other, length)["reasoning"]
        made = {fault: with_reasoning(row, other, length, fault) for fault in Fault}
        for fault in (Fault.PLAN, Fault.EVIDENCE, Fault.CONCLUSION):
            assert made[fault]["answer"] == other["answer"], fault
        plan, evidence = made[Fault.PLAN]["reasoning"], made[Fault.EVIDENCE]["reasoning"]
        assert "look only" in plan and "beep" not in plan.replace(row["question"], "").replace(
            "beeps :", ""
        )
        assert evidence.startswith(f"plan : {row['question']}") and evidence != honest
        assert made[Fault.CONCLUSION]["reasoning"].startswith(honest.rpartition(" . so ")[0])
        assert f"so maybe {other['answer']}" in made[Fault.CONCLUSION]["reasoning"]


def test_the_cold_start_is_taught_each_fault_equally_often(rows: list[dict[str, Any]]) -> None:
    many = rows * 20
    made = taught(many, "medium", HONEST, seed=0)
    plan = sum("look only" in row["reasoning"] for row in made) / len(made)
    guessed = sum("so maybe" in row["reasoning"] for row in made) / len(made) - plan
    assert plan == pytest.approx((1 - HONEST) / 3, abs=0.04)
    assert guessed == pytest.approx((1 - HONEST) / 3, abs=0.04)
    assert made == taught(many, "medium", HONEST, seed=0) != taught(many, "medium", HONEST, seed=1)


def test_arms_of_a_length_differ_in_their_weights_only() -> None:
    for length in PASSES:
        configs = [configure(NOWHERE, f"{length}, {shape}", 0, Path()) for shape in SHAPES]
        plain = [config.model_dump(mode="json") for config in configs]
        seen = {
            (one["learner"]["objective"].pop("tas_shape"), one["learner"]["objective"].pop(key))
            for one in plain
            for key in ["tas_lambda"]
        }
        assert len(seen) == len(SHAPES) and all(one == plain[0] for one in plain)
        # weights of mean 1: no shape is a higher rate
        assert plain[0]["learner"]["objective"]["tas_normalize"] == "unit_mean"
        assert length_of(configs[0]) == length
        assert configs[0].loop.steps * 64 == COMPLETIONS


def test_the_judge_sees_each_fault_at_each_length() -> None:
    marks = judged()
    for length in PASSES:
        assert marks[length, Fault.NONE] > 0.95
        for fault in (Fault.PLAN, Fault.EVIDENCE, Fault.CONCLUSION):
            assert marks[length, fault] < marks[length, Fault.NONE] - 0.1


def a_run(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    curve = [[at, at * 40, 0.0, 0.0, at // 64, accuracy] for at in (0, COMPLETIONS // 2, 700)]
    return {
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "heldout": [0.3, accuracy],
        "distributions": {},
    }


def test_gains_are_paired_by_seed_and_have_an_interval_from_two_seeds() -> None:
    runs = [
        *(a_run(f"short, {UNIFORM}", seed, level) for seed, level in ((0, 0.4), (1, 0.6))),
        *(a_run("short, parabolic 0.3", seed, level) for seed, level in ((1, 0.7), (0, 0.46))),
        a_run("short, inverse 0.3", 0, 0.3),
        a_run("short, decay 0.3", 5, 0.9),
    ]
    arms = in_order(runs)
    assert sorted(gains(arms, "short", "parabolic 0.3")) == pytest.approx([0.06, 0.1])
    figures = flat(arms)
    assert figures["gain_short_parabolic_0p3"] == pytest.approx(0.08)
    width = 12.706 * 0.02  # t of one degree of freedom times deviation over root two
    assert figures["gain_short_parabolic_0p3_high"] == pytest.approx(0.08 + width, abs=1e-3)
    assert figures["gain_short_inverse_0p3"] == pytest.approx(-0.1)
    assert "gain_short_inverse_0p3_low" not in figures and "gain_short_decay_0p3" not in figures
    assert figures["tokens_short_uniform"] == pytest.approx(40)
    assert figures["best_lambda_short"] == SHAPES["decay 0.3"][1]
    assert "| short | inverse 0.3 | 1 | 40 |" in tables(arms) and "one seed" in tables(arms)


def test_records_that_are_kept_are_of_this_protocol_and_its_settings() -> None:
    kept = RECORDS / "length.jsonl"
    records = list(read_jsonl(kept)) if kept.is_file() else []
    assert {one["protocol"] for one in records} <= {protocol()}
    whole = [one for one in records if "crashed" not in one]
    assert {one["arm"] for one in records} <= CELLS.keys() and stale(whole) == []


def test_settings_that_changed_make_a_record_stale() -> None:
    name = f"medium, {UNIFORM}"
    config = configure(NOWHERE, name, 0, Path())
    of_today = recipe_digest(config, ground_of("medium"))
    about = {"arm": name, "seed": 0, "commit": "abc"}
    assert stale([about | {"digest": of_today}]) == []
    assert stale([about | {"digest": recipe_digest(config, ground_of("long"))}]) == [
        f"{name} seed 0 (commit abc)"
    ]


def test_every_type_needs_the_sound(rows: list[dict[str, Any]]) -> None:
    assert {row["category"] for row in rows} == {str(kind) for kind in TYPES}
    assert all("audio" in row["needs"] for row in rows)
