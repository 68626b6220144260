"""`avatar train` of a recipe with stages, and `avatar evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from avatar_rl.cluster.recipe.load import parse_overrides, read_recipe, resolve_recipe, to_yaml
from avatar_rl.cluster.recipe.presets import Overlay
from avatar_rl.common.errors import ConfigError

if TYPE_CHECKING:
    from avatar_rl.cluster.curriculum.stages import Curriculum


#: Keys of a recipe that only a curriculum has.
CURRICULUM_KEYS = ("stages", "modality_check")


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Options of `avatar train` that only a curriculum takes."""
    group = parser.add_argument_group("recipes with stages")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--stage", metavar="NAME", help="run this stage alone, from what the stage before it made"
    )
    one.add_argument("--from-stage", metavar="NAME", help="run this stage and those after it")
    group.add_argument(
        "--start",
        type=Path,
        metavar="CHECKPOINT",
        help="start that stage from this checkpoint instead",
    )


def add_evaluate_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="held-out accuracy of a checkpoint, also without one of its modalities"
    )
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument(
        "--recipe", type=Path, required=True, help="data, template, engine and rewards"
    )
    evaluate.add_argument(
        "--without",
        action="append",
        choices=["audio", "video", "image"],
        default=[],
        help="silence or black in its place; may be repeated",
    )
    evaluate.set_defaults(run=evaluate_checkpoint)


def train_curriculum(raw: Overlay, options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run (or with --dry-run show) all stages, or those that are asked for."""
    from avatar_rl.cluster.curriculum.stages import resolve

    overrides = parse_overrides(rest)
    curriculum = resolve(raw, overrides, preset_name=options.preset, source=str(options.recipe))
    named = options.stage or options.from_stage
    if options.start is not None:
        if named is None:
            raise ConfigError(
                "--start names the checkpoint of a stage: give --stage or --from-stage too"
            )
        if not options.start.is_dir():
            raise ConfigError(f"--start {options.start} is not a checkpoint folder")
        stages = [
            replace(s, start=options.start) if s.name == named else s for s in curriculum.stages
        ]
        curriculum = replace(curriculum, stages=tuple(stages))
    if options.resume not in (None, "auto"):
        raise ConfigError(
            f"--resume {options.resume}: a recipe with stages goes on by itself, from its last "
            "checkpoint; to run one "
            "of them again use --stage or --from-stage"
        )
    if options.dry_run:
        return _show(curriculum, only=options.stage, first=options.from_stage)
    from avatar_rl.cluster.commands.runs import stoppable
    from avatar_rl.cluster.services.shared_storage import placed

    where = tuple(replace(stage, config=placed(stage.config)) for stage in curriculum.stages)
    curriculum = replace(curriculum, stages=where, folder=where[0].config.output.folder)
    return stoppable(lambda: _train(curriculum, only=options.stage, first=options.from_stage))


def _train(curriculum: Curriculum, *, only: str | None, first: str | None) -> None:
    from avatar_rl.cluster.curriculum.report import print_stages
    from avatar_rl.cluster.curriculum.run import CurriculumRun  # brings torch

    state = CurriculumRun(curriculum).execute(only=only, first=first)
    console = Console(highlight=False)
    print_stages(state, console)
    console.print(f"report       {curriculum.folder / 'report.html'}", highlight=False)
    if state.stages:
        console.print(f"checkpoint   {state.stages[-1].checkpoint}", highlight=False)


def _show(curriculum: Curriculum, *, only: str | None, first: str | None) -> int:
    from avatar_rl.cluster.curriculum.record import read_state
    from avatar_rl.cluster.recipe.resources import needs_of

    state, names = read_state(curriculum.folder), [stage.name for stage in curriculum.stages]
    wanted = names if only is None else [only]
    wanted = names[names.index(first) :] if first in names else wanted
    for number, stage in enumerate(curriculum.stages, 1):
        config = stage.config
        start = stage.start or ("the recipe's model" if number == 1 else "the stage before")
        print(
            f"# ---- stage {number}: {stage.name} ({'SFT' if stage.is_sft else 'RL'}), from {start}"
        )
        print(f"# trains {config.data.select}; rewards {config.rewards.weights}")
        print(to_yaml(config))
    print("# resources each stage asks for")
    for name, amount in needs_of(curriculum.stages[-1].config).rows():
        print(f"#   {name:<34} {amount}")
    print(f"# curriculum folder {curriculum.folder}")
    for name in names:
        known = "has a result" if state.get(name) is not None else "to be run"
        if state.underway is not None and state.underway.name == name:
            known = f"begun: {state.underway.run}"
        print(f"#   {name:<34} {known if name in wanted else 'not asked for'}")
    return 0


def evaluate_checkpoint(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Accuracy by question type and need on the terminal."""
    from avatar_rl.cluster.telemetry.screen import Screen
    from avatar_rl.cluster.training.evaluate import evaluate

    raw = read_recipe(options.recipe)
    common = {name: value for name, value in raw.items() if name not in CURRICULUM_KEYS}
    config = resolve_recipe(common, parse_overrides(rest), source=str(options.recipe))
    if not options.checkpoint.is_dir():
        raise ConfigError(f"{options.checkpoint} is not a checkpoint folder")
    model = config.model.model_copy(update={"path": str(options.checkpoint)})
    config = config.model_copy(update={"name": "evaluate", "cold_start": None, "model": model})
    kinds = tuple(sorted(set(options.without)))
    terminal = {"auto": None, "live": True, "plain": False}[config.screen]
    with Screen(1, terminal, title="evaluate") as screen:
        result = evaluate(config, screen, model=options.checkpoint, without=[kinds])
    if not result.evaluations:
        raise ConfigError(f"recipe {options.recipe} has no held-out prompts: set data.heldout")
    [evaluation] = result.evaluations
    without = f" without {' and '.join(kinds)}" if kinds else ""
    print(f"held-out accuracy{without} {evaluation.accuracy:.3f} on {evaluation.prompts} prompts")
    for label, family in (("", evaluation.by_category), ("needs ", evaluation.by_need)):
        for name, value in family.items():
            print(f"  {label + name:<24} {value:.2f}")
    print(f"run folder   {result.run}")
    return 0
