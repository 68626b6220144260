"""The study's arithmetic: passages, censoring, intervals, what makes two runs the same, and the
document's tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import pytest

from avatar_rl.cluster.recipe.overlays import Overlay
from benchmarks.studies.arms import ARMS, CANDIDATES, GRPO_ARMS, RATIOS, REPORT_SEEDS, TUNING_SEEDS
from benchmarks.studies.report import LEARNER, Study, bootstrap, insert, passage, ratio
from benchmarks.studies.runs import Records, boil_down, digest, resolve
from benchmarks.studies.sweep_arms import ARMS as SWEPT
from benchmarks.studies.sweep_arms import BASE, COMPLETIONS, SWEEPS, measured_every
from benchmarks.studies.sweep_report import mean_accuracy

INF = math.inf


def record(arm: str, seed: int, *curve: tuple[float, float]) -> dict[str, object]:
    return {
        "arm": arm,
        "seed": seed,
        "curve": [
            [completions, 10 * completions, 1.0, completions / 100, 1, accuracy]
            for completions, accuracy in curve
        ],
        "heldout": [0.3, 0.5],
        "dead": 0.5,
        "dead_after": 0.25,
    }


def test_passage_is_the_first_measurement_at_or_above_the_target() -> None:
    run = record("a", 0, (0, 0.3), (64, 0.8), (128, 0.7), (192, 0.9))
    assert passage(run, 0.8) == 64 and passage(run, 0.85) == 192 and passage(run, 0.95) == INF
    assert passage(run, 0.85, LEARNER) == 1.92


def test_censored_runs_count_as_late() -> None:
    assert ratio([100, 200, INF], [10, 20, INF]) == 10  # medians 200 and 20
    assert ratio([100, INF, INF], [10, 20, 30]) == INF
    assert ratio([100, 200, 300], [10, INF, INF]) == 0
    assert math.isnan(ratio([1, INF, INF], [1, INF, INF]))


def test_bootstrap_covers_the_ratio_and_narrows_with_agreement() -> None:
    over, under = [500.0, 600, 700, 800, 900], [80.0, 90, 100, 110, 120]
    low, high = bootstrap(over, under)
    assert low < median(over) / median(under) < high
    assert low >= 500 / 120 and high <= 900 / 80
    assert bootstrap([500.0] * 5, [100.0] * 5) == (5, 5)


def test_the_best_learning_rate_has_the_smallest_median() -> None:
    runs = [
        record("grpo@2e-4", seed, (0, 0.1), (at, 0.9)) for seed, at in enumerate((300, 400, 500))
    ]
    runs += [
        record("grpo@4e-4", seed, (0, 0.1), (at, 0.9)) for seed, at in enumerate((100, 450, 600))
    ]
    runs += [record("grpo@8e-4", seed, (0, 0.1), (64, 0.2)) for seed in range(3)]
    assert Study(runs).best(GRPO_ARMS, 0.8) == "grpo@2e-4"
    assert Study(runs).best(["avatar"], 0.8) is None


def test_tuning_never_sees_a_report_seed() -> None:
    assert not set(TUNING_SEEDS) & set(REPORT_SEEDS) and len(REPORT_SEEDS) >= 5
    assert len(GRPO_ARMS) >= 3
    assert all(
        any(name == arm or name.startswith(f"{arm}@") for name in ARMS)
        for pair in RATIOS.values()
        for arm in pair
    )


def _base(folder: Path) -> Overlay:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text(f'{{"id": "{name}"}}\n')
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "heldout")}
    return {
        "model": {"path": str(folder / "model")},
        "data": data | {"reader": {"media_root": str(folder)}},
    }


def test_the_digest_follows_what_may_change_a_run_and_nothing_else(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    arm = ARMS["grpo@2e-4"]
    first = digest(resolve(_base(here), arm, 0, 1024))
    assert first == digest(resolve(_base(there), arm, 1, 1024))  # the seed is a key of its own
    assert first != digest(resolve(_base(here), ARMS["grpo@4e-4"], 0, 1024))
    config = resolve(_base(here), arm, 0, 1024)
    (here / "train.jsonl").write_text('{"id": "other"}\n')
    assert digest(config) != first
    config = resolve(_base(there), arm, 0, 1024)
    (there / "model" / "model.safetensors").write_bytes(b"trained")
    assert digest(config) != first


@pytest.mark.parametrize("arm", SWEPT)
def test_every_arm_of_the_sweeps_is_measured_after_as_many_completions(
    arm: str, tmp_path: Path
) -> None:
    config = resolve(_base(tmp_path), SWEPT[arm], 0, COMPLETIONS)
    per_step = config.loop.prompts_per_step * config.loop.fresh
    assert config.loop.steps * per_step == COMPLETIONS == 576
    assert measured_every(SWEPT[arm]) * per_step == max(32, per_step)
    assert config.loop.fresh + config.loop.replayed == 8


def test_every_panel_of_the_sweeps_shows_known_arms_around_the_same_one() -> None:
    shown = {arm for entries in SWEEPS.values() for _, arm in entries}
    assert shown == set(SWEPT) and all(
        BASE in [arm for _, arm in entries] for entries in SWEEPS.values()
    )


def test_the_area_under_a_curve_is_the_mean_accuracy_of_as_many_completions() -> None:
    area = 0.3 * 64 + 0.4 * 512
    assert mean_accuracy(record("a", 0, (0, 0.2), (64, 0.4), (COMPLETIONS, 0.4))) == pytest.approx(
        area / COMPLETIONS
    )
    later = record("a", 0, (0, 0.2), (64, 0.4), (512, 0.4), (640, 0.4), (1000, 9.0))
    assert mean_accuracy(later) == pytest.approx(area / COMPLETIONS)


@pytest.mark.parametrize("arm", [*ARMS, *CANDIDATES])
def test_every_arm_resolves_to_as_many_steps_as_its_completions_take(
    arm: str, tmp_path: Path
) -> None:
    loop = resolve(_base(tmp_path), (ARMS | CANDIDATES)[arm], 0, 1000).loop
    assert (
        (loop.steps - 1) * loop.prompts_per_step * loop.fresh
        < 1000
        <= loop.steps * loop.prompts_per_step * loop.fresh
    )


def test_a_finished_run_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "study" / "runs.jsonl"
    Records(path).add({"arm": "grpo", "seed": 3, "digest": "d", "curve": []})
    again = Records(path)
    assert again.get("grpo", 3, "d") == {"arm": "grpo", "seed": 3, "digest": "d", "curve": []}
    assert again.get("grpo", 3, "other") is None and again.get("grpo", 4, "d") is None
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 1


def test_a_run_is_boiled_down_to_its_measurements() -> None:
    def step(number: int, completions: float, **more: float) -> dict[str, float]:
        return {
            "step": number,
            "completions/generated": completions,
            "tokens/generated": 20 * completions,
            "time/step": 0.5,
            "time/encode": 0.01,
            "time/forward_backward": 0.2,
            "time/optimizer": 0.01,
            "time/publish": 0.03,
            "learner/updates": 4.0,
            "groups/dead_before": 0.5,
            **more,
        }

    rows = [
        {"step": 0, "pool/accuracy": 0.4, "eval/accuracy": 0.3},
        step(1, 64),
        step(2, 128, **{"pool/accuracy": 0.5}),
    ]
    shapes = [{"step": n, "advantages/fresh": [n, 1]} for n in (1, 2)] + [
        {"step": 3, "advantages/replay": [4]}
    ]
    found = boil_down([*rows, {"step": 3, "eval/accuracy": 0.6}], shapes)
    assert found["distributions"] == {"advantages/fresh": [3, 2], "advantages/replay": [4]}
    assert found["curve"] == [[0, 0, 0, 0, 0, 0.4], [128, 2560, 1.0, 0.5, 8, 0.5]]
    assert found["heldout"] == [0.3, 0.6] and found["dead"] == 0.5 and found["dead_after"] is None


def test_tables_go_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "science.md"
    begin, end = "<!-- sweeps: begin -->", "<!-- sweeps: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    insert(page, "new", "sweeps")
    assert page.read_text() == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    with pytest.raises(ValueError, match="needs one '<!-- study: begin -->'"):
        insert(page, "new")
    page.write_text("no markers")
    with pytest.raises(ValueError, match="needs one"):
        insert(page, "new")
