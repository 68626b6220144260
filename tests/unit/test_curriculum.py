"""Curriculum recipes: how stages are resolved, which of them run again, what the table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.curriculum.record import (
    STATE,
    CurriculumState,
    Result,
    StageRecord,
    Underway,
    read_state,
)
from avatar_rl.cluster.curriculum.report import footers, markdown, print_stages
from avatar_rl.cluster.curriculum.run import CurriculumRun
from avatar_rl.cluster.curriculum.stages import Curriculum, resolve
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.common.errors import ConfigError, DataError

ROWS = {
    "train": [("t0", "colour", "red"), ("t1", "colour", "blue"), ("t2", "beeps", "2")],
    "heldout": [("h0", "colour", "red"), ("h1", "beeps", "3")],
    "sft": [("s0", "colour", "red")],
}


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A recipe of three stages over text prompts."""
    for split, rows in ROWS.items():
        lines = [
            f'{{"id": "{i}", "question": "{c}?", "answer": "{a}", "problem_type": "free_form", '
            f'"category": "{c}"}}'
            for i, c, a in rows
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "name": "course",
        "preset": "avatar",
        "data": {split: str(tmp_path / f"{split}.jsonl") for split in ROWS},
        "cold_start": {"steps": 2},
        "loop": {"steps": 100},
        "rewards": {"numeric": "exact", "weights": {"format": 1.0}},
        "output": {"folder": str(tmp_path / "runs")},
        "stages": [
            {"name": "sft", "kind": "sft"},
            {
                "name": "see",
                "select": {"categories": ["colour"]},
                "steps": 7,
                "rewards": {"weights": {"accuracy": 1}},
            },
            {
                "name": "hear",
                "select": {"categories": ["beeps"]},
                "preset": "grpo",
                "replay": "keep",
                "target_accuracy": 0.9,
                "overrides": {"learner": {"optimizer": {"lr": 0.1}}},
            },
        ],
    }


def resolved(
    raw: dict[str, Any], *overrides: tuple[str, str], preset_name: str | None = None
) -> Curriculum:
    return resolve(raw, overrides, preset_name=preset_name, source="course.yaml")


def test_a_stage_lies_over_its_preset_and_that_over_the_recipe(raw: dict[str, Any]) -> None:
    sft, see, hear = resolved(raw).stages
    assert sft.is_sft and sft.config.cold_start is not None
    assert (
        see.config.cold_start is None
        and see.config.loop.steps == 7
        and see.config.loop.replayed == 4
    )
    assert see.config.rewards.weights == {"accuracy": 1}  # replaced, not mixed
    assert see.config.rewards.numeric == "exact"
    assert (
        hear.config.loop.steps == 100
        and hear.config.loop.replayed == 0
        and hear.config.preset == "grpo"
    )
    assert hear.config.loop.target_accuracy == 0.9 and hear.config.learner.optimizer.lr == 0.1
    assert hear.keeps_replay and not see.keeps_replay
    assert {stage.config.output.folder for stage in (sft, see, hear)} == {resolved(raw).folder}


def test_the_command_line_lies_over_every_stage(raw: dict[str, Any]) -> None:
    stages = resolved(raw, ("loop.steps", "3"), preset_name="dapo").stages
    assert [stage.config.loop.steps for stage in stages] == [3, 3, 3]
    assert [stage.config.learner.objective.loss_type for stage in stages] == [
        "grpo",
        "dapo",
        "dapo",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "stages must be a list"),
        ({"stages": [{"name": "a", "kind": "rl"}]}, "no stage runs its cold_start"),
        ({"stages": [{"name": "a", "kind": "sft"}, {"name": "a"}]}, "a occur twice"),
        (
            {"stages": [{"name": "a", "kind": "sft", "step": 3}]},
            "stage a:\n  step: unknown key, did you mean 'steps'",
        ),
        (
            {"stages": [{"name": "a", "kind": "sft", "rewards": {"weights": {"acuracy": 1}}}]},
            "unknown reward 'acura",
        ),
        (
            {"stages": [{"name": "a", "kind": "sft", "rewards": {"weights": {"format": 0}}}]},
            "weights sum to 0",
        ),
        (
            {"stages": [{"name": "a", "kind": "sft", "start": "/nowhere"}]},
            "start /nowhere is not a checkpoint",
        ),
        ({"stages": [{"name": "a", "kind": "sft", "replay": "keep"}]}, "keep needs a stage before"),
        ({"cold_start": None}, "kind sft needs a `cold_start`"),
        ({"modality_check": 3}, "modality_check is 3"),
    ],
)
def test_a_curriculum_that_makes_no_sense_names_the_stage(
    raw: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(raw | change)


def test_a_stage_without_prompts_of_its_types_stops_everything_before_it_starts(
    raw: dict[str, Any],
) -> None:
    raw["stages"][2]["select"] = {"categories": ["localise"]}
    with pytest.raises(
        DataError, match="stage hear: no training prompt has the question type 'localise'"
    ):
        CurriculumRun(resolved(raw)).prepare()


def test_a_judge_that_does_not_answer_stops_everything_before_it_starts(
    raw: dict[str, Any],
) -> None:
    from avatar_rl.common.errors import ResourceError

    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "request_timeout_s": 2}
    raw["stages"][1]["rewards"] = {"weights": {"judge": 1}, "judge": judge}
    with pytest.raises(
        ResourceError, match=r"stage see: judge at http://127.0.0.1:9/v1 does not answer"
    ):
        CurriculumRun(resolved(raw)).prepare()


def test_a_hint_that_holds_the_answer_stops_a_run_where_hints_may_fire(raw: dict[str, Any]) -> None:
    file = Path(raw["data"]["train"])
    file.write_text(
        file.read_text().replace(
            '"answer": "blue"', '"answer": "blue", "hint": "Is the disc blue?"'
        )
    )
    with pytest.raises(DataError, match="stage see: hints that give the answer away: prompt 't1'"):
        CurriculumRun(resolved(raw)).prepare()
    raw["buffer"] = {"hints": {"enabled": False}}
    raw["preset"] = None
    CurriculumRun(resolved(raw)).prepare()


def test_fusion_without_prompts_that_have_both_senses_stops_everything(raw: dict[str, Any]) -> None:
    raw["stages"][1]["rewards"] = {"weights": {"accuracy": 1, "fusion": 1}}
    with pytest.raises(
        DataError, match=r"stage see: rewards\.weights\.fusion compares with video alone and audio"
    ):
        CurriculumRun(resolved(raw)).prepare()


def finish(run: CurriculumRun, upto: int) -> None:
    """Pretend that the first stages have been run."""
    parent = ""
    for stage in run.curriculum.stages[:upto]:
        parent = stage.digest(run._datasets[stage.name], parent)
        checkpoint = run.curriculum.folder / stage.name
        checkpoint.mkdir(parents=True, exist_ok=True)
        record = StageRecord.of(stage, parent, checkpoint, checkpoint, None, None, seconds=1.0)
        run.state.stages.append(record)


def actions(run: CurriculumRun, **asked: str | None) -> list[str]:
    return [action for _, action in run.plan(**asked)]


def prepared(raw: dict[str, Any]) -> CurriculumRun:
    run = CurriculumRun(resolved(raw))
    run.prepare()
    return run


def test_finished_stages_are_not_run_again(raw: dict[str, Any]) -> None:
    run = prepared(raw)
    assert actions(run) == ["run", "run", "run"]
    finish(run, 2)
    assert actions(run) == ["done before", "done before", "run"]
    assert actions(run, only="hear") == ["not asked for", "not asked for", "run"]
    assert actions(run, first="see") == ["not asked for", "run", "run"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: raw["stages"][1].update(steps=8), ["done before", "run", "run"]),
        (lambda raw: raw["stages"][2].update(steps=8), ["done before", "done before", "run"]),
        (lambda raw: raw["cold_start"].update(steps=3), ["run", "run", "run"]),
        (lambda raw: raw.update(rollout={"workers": 3}), ["done before"] * 3),
        (
            lambda raw: raw.update(rollout={"max_workers": 9, "autoscale": True, "lease_s": 60}),
            ["done before"] * 3,
        ),
        (
            lambda raw: raw.setdefault("buffer", {}).update(url="redis://elsewhere:6379"),
            ["done before"] * 3,
        ),
        (lambda raw: raw.setdefault("loop", {}).update(step_timeout_s=9), ["done before"] * 3),
        (lambda raw: raw.setdefault("evaluation", {}).update(timeout_s=9), ["done before"] * 3),
        (lambda raw: raw.setdefault("evaluation", {}).update(limit=1), ["run"] * 3),
        (lambda raw: raw["data"].update(media={"max_frames": 8}), ["run"] * 3),
        (lambda raw: raw["data"].update(media={"blank": ["video"]}), ["run"] * 3),
        (lambda raw: raw["data"].update(media={"threads": 2}), ["done before"] * 3),
    ],
)
def test_a_changed_stage_and_all_that_follow_from_it_run_again(
    raw: dict[str, Any], change: Any, expected: list[str]
) -> None:
    run = prepared(raw)
    finish(run, 3)
    change(raw)
    again = prepared(raw)
    again.state = run.state
    assert actions(again) == expected


def begin(run: CurriculumRun, name: str) -> Path:
    """Pretend that a stage was interrupted."""
    parent = ""
    for stage in run.curriculum.stages:
        parent = stage.digest(run._datasets[stage.name], parent)
        if stage.name == name:
            folder = run.curriculum.folder / f"{name}-1"
            folder.mkdir(parents=True)
            (folder / "status.json").write_text("{}")
            run.state.underway = Underway(name=name, digest=parent, run=str(folder))
            return folder
    raise AssertionError(name)


def test_an_interrupted_stage_goes_on(raw: dict[str, Any]) -> None:
    run = prepared(raw)
    finish(run, 1)
    folder = begin(run, "see")
    assert actions(run) == ["done before", "resume", "run"]
    assert actions(run, only="see") == ["not asked for", "resume", "not asked for"]
    (folder / "status.json").unlink()  # killed before it had a folder
    assert actions(run) == ["done before", "run", "run"]


def test_an_interrupted_stage_that_is_another_one_now_runs_from_its_start(
    raw: dict[str, Any],
) -> None:
    run = prepared(raw)
    finish(run, 2)
    begin(run, "hear")
    assert actions(run) == ["done before", "done before", "resume"]
    assert actions(run, first="see") == [
        "not asked for",
        "run",
        "run",
    ]  # it started from another policy
    raw["stages"][2].update(steps=8)
    changed = prepared(raw)
    changed.state = run.state
    assert actions(changed) == ["done before", "done before", "run"]


def test_a_changed_dataset_runs_everything_again(raw: dict[str, Any]) -> None:
    run = prepared(raw)
    finish(run, 3)
    file = Path(raw["data"]["heldout"])
    file.write_text(file.read_text().replace("red", "green"))
    assert actions(run) == ["run", "run", "run"]


def test_a_lost_checkpoint_is_made_again_and_a_missing_one_is_named(raw: dict[str, Any]) -> None:
    run = prepared(raw)
    finish(run, 2)
    Path(run.state.stages[1].checkpoint).rmdir()
    assert actions(run) == ["done before", "run", "run"]
    with pytest.raises(
        ConfigError, match="stage hear starts from stage see, which has no checkpoint"
    ):
        run.plan(only="hear")
    with pytest.raises(ConfigError, match="has no stage 'smell': it has sft, see, hear"):
        run.plan(only="smell")


def test_the_state_file_survives_a_round_trip_and_damage_is_named(
    tmp_path: Path, state: CurriculumState
) -> None:
    (tmp_path / STATE).write_text(state.model_dump_json())
    assert read_state(tmp_path) == state
    (tmp_path / STATE).write_text("{")
    with pytest.raises(DataError, match=r"stages.json is damaged"):
        read_state(tmp_path)
    assert read_state(tmp_path / "new") == CurriculumState()


@pytest.fixture
def state(raw: dict[str, Any]) -> CurriculumState:
    """Two finished stages with their evaluations."""
    run = prepared(raw)
    finish(run, 2)
    for record, (colour, beeps) in zip(run.state.stages, ((0.25, 0.5), (0.75, 0.375)), strict=True):
        record.after = Result(
            accuracy=(colour + beeps) / 2,
            prompts=8,
            by_category={"beeps": beeps, "colour": colour},
            by_need={"audio": beeps, "video": colour},
        )
    run.state.modalities = {
        "audio": Result(accuracy=0.5, prompts=8, by_need={"audio": 0.25, "video": 0.75})
    }
    return run.state


def test_the_table_has_a_column_per_stage_and_a_row_per_type_and_need(
    state: CurriculumState,
) -> None:
    text = markdown("course", state)
    assert "|  | sft | see |" in text
    assert "| all prompts | 0.375 | 0.562 |" in text
    assert "| colour | 0.250 | **0.750** |" in text  # the stage trained it
    assert "| needs audio | 0.500 | 0.375 |" in text
    assert footers(state) == [
        "see without audio: all 0.56 -> 0.50, needs audio 0.38 -> 0.25, needs video 0.75 -> 0.75"
    ]
    console = Console(width=80, record=True, file=None, quiet=True)
    print_stages(state, console)


def test_dry_run_shows_every_stage_and_starts_nothing(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    recipe = tmp_path / "course.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    assert main(["train", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "stage 1: sft (SFT)",
        "stage 2: see (RL)",
        "stage 3: hear (RL)",
        "trains colour",
        "1 x rollout actor",
    ):
        assert name in shown
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="is a curriculum"):
        load_recipe(recipe)


def test_a_dry_run_names_what_any_stage_lacks(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    for number, stage in enumerate(raw["stages"]):
        stage["overrides"] = {"data": {"train": f"gone{number}.jsonl"}}
    raw["stages"][1]["overrides"]["rollout"] = {"workers": 3}
    recipe = tmp_path / "course.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    assert main(["train", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for number in range(len(raw["stages"])):
        assert f"gone{number}.jsonl is missing" in shown
    assert "resources that each of sft, hear asks for" in shown
    assert "resources that stage see asks for" in shown
    assert "3 x rollout actor" in shown and "1 x rollout actor" in shown


def test_options_of_a_curriculum_need_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("data: {synthetic: {}}\n")
    assert main(["train", str(recipe), "--stage", "see"]) == 1
    assert "has no stages" in capsys.readouterr().err


def test_the_curriculum_of_the_repository_resolves() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "curriculum_local.yaml"
    from avatar_rl.cluster.recipe.load import read_recipe

    stages = resolve(read_recipe(recipe), (), preset_name=None, source=str(recipe)).stages
    assert [stage.name for stage in stages] == ["sft", "visual", "audio_visual", "localisation"]
    local = load_recipe(recipe.with_name("local.yaml"))
    assert (
        stages[0].config.data.synthetic == local.data.synthetic
    )  # one world and one cold start in the cache
    assert stages[0].config.cold_start == local.cold_start
