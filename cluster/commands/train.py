"""`avatar train`, also of a recipe with stages, and `avatar evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rl.cluster.adapter_road import road_words
from avatar_rl.cluster.commands.doctor import missing_inputs
from avatar_rl.cluster.commands.runs import stoppable, train_and_summarise
from avatar_rl.cluster.machine.fit import demands, machine_words
from avatar_rl.cluster.recipe.assets import checkpoint_folder
from avatar_rl.cluster.recipe.gpus import local_gpus
from avatar_rl.cluster.recipe.load import (
    against_preset,
    load_recipe,
    overridden,
    parse_overrides,
    read_recipe,
    renamed,
    resolve_recipe,
    to_yaml,
)
from avatar_rl.cluster.recipe.memory import MemoryPlan
from avatar_rl.cluster.recipe.overlays import Overlay
from avatar_rl.cluster.recipe.resources import asked_by, needs_of
from avatar_rl.common.errors import AvatarError, ConfigError, ResourceError
from avatar_rl.learner.adapter.files import is_adapter

if TYPE_CHECKING:
    from avatar_rl.cluster.config import RunConfig
    from avatar_rl.cluster.curriculum.stages import Curriculum, Stage
    from avatar_rl.prompts.record import Modality

#: Keys of a recipe that only a curriculum has.
CURRICULUM_KEYS = ("stages", "modality_check")


@dataclass(frozen=True)
class Asked:
    """The options of `avatar train`; the last three are for recipes with stages."""

    preset: str | None = None
    dry_run: bool = False
    resume: str | None = None
    stage: str | None = None
    from_stage: str | None = None
    start: Path | None = None


def train(recipe: Path, overrides: Sequence[str], asked: Asked) -> int:
    """Run (or with ``dry_run`` show) a recipe; exit code as of ``stoppable``."""
    raw = read_recipe(recipe)
    if "stages" in raw:
        return _train_curriculum(raw, str(recipe), overrides, asked)
    if asked.stage or asked.from_stage or asked.start:
        raise ConfigError(
            f"recipe {recipe} has no stages: --stage, --from-stage and --start are for those"
        )
    config = load_recipe(recipe, parse_overrides(overrides), preset_name=asked.preset)
    hand = overridden(renamed(raw, str(recipe)), parse_overrides(overrides))
    _remark(against_preset(hand, asked.preset))
    if not asked.dry_run:
        return train_and_summarise(config, asked.resume)
    print(to_yaml(config))
    print("# resources this run asks for")
    _show_needs(config)
    return 0


def _show_needs(config: RunConfig) -> None:
    """Processes, memory by part where the model's size is known, and what is missing here."""
    _remark(_needs(config))
    _show_missing([config])
    _check_shared_gpu(config)


def _needs(config: RunConfig) -> list[str]:
    """Processes, and memory by part where the model's size is known; a line each."""
    machine = config.resources.machine
    needs = asked_by(config) if machine is not None else needs_of(config)  # of this machine
    found = [f"  {name:<34} {amount}" for name, amount in needs.rows()]
    if road := _adapter_words(config):
        found.append(f"  {'rollouts take':<34} {road}")
    plan = MemoryPlan.of(config)
    if plan is not None:
        found.append(f"memory for {plan.model.name} in GiB, by arithmetic (docs/cluster.md)")
        found.extend(f"  {name:<34} {amount}" for name, amount in plan.rows())
    if machine is not None:
        found.append(f"the machine it is written for: {machine_words(machine)}")
        found.extend(f"  {demand.what:<34} {demand.words()}" for demand in demands(config))
    return found


def _adapter_words(config: RunConfig) -> str:
    """What rollouts take of a LoRA run. A folder that cannot be read is told of by its own
    finding."""
    try:
        return road_words(config, checkpoint_folder(config))
    except (AvatarError, OSError, ValueError):
        return road_words(config, None)


def _show_missing(configs: Iterable[RunConfig]) -> None:
    """What any of them needs and is not here, each once."""
    if absent := dict.fromkeys(line for config in configs for line in missing_inputs(config)):
        _remark(["missing here", *(f"  {line}" for line in absent)])


def _check_shared_gpu(config: RunConfig) -> None:
    """Raises ResourceError where engine and learner do not fit into a GPU of this machine."""
    plan, (gpus, _) = MemoryPlan.of(config), local_gpus()
    if plan is None or not config.resources.colocate or not gpus:
        return
    if misfits := plan.misfits(min(gpu.bytes for gpu in gpus)):
        raise ResourceError(f"{gpus[0].name} is too small for this recipe: " + "; ".join(misfits))
    print(f"# it fits into the GPU here: {gpus[0].name}")


def _remark(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"# {line}")


def _train_curriculum(raw: Overlay, source: str, overrides: Sequence[str], asked: Asked) -> int:
    """All stages, or those that are asked for."""
    from avatar_rl.cluster.curriculum.stages import resolve

    curriculum = resolve(raw, parse_overrides(overrides), preset_name=asked.preset, source=source)
    names = [stage.name for stage in curriculum.stages]
    for option, name in (("--stage", asked.stage), ("--from-stage", asked.from_stage)):
        if name is not None and name not in names:
            raise ConfigError(
                f"{option} {name}: recipe {source} has no such stage, it has {', '.join(names)}"
            )
    if asked.start is not None:
        curriculum = _started(curriculum, asked.start, asked.stage or asked.from_stage)
    if asked.resume not in (None, "auto"):
        raise ConfigError(
            f"--resume {asked.resume}: a recipe with stages resumes by itself, from its last "
            "checkpoint; to run one of them again use --stage or --from-stage"
        )
    if asked.dry_run:
        return _show(curriculum, only=asked.stage, first=asked.from_stage)
    from avatar_rl.cluster.commands.doctor import preflight
    from avatar_rl.cluster.services.shared_storage import placed

    for stage in curriculum.stages:
        _remark([f"stage {stage.name}: {line}" for line in stage.by_hand])
    preflight({stage.name: _begun(stage) for stage in curriculum.stages})
    where = tuple(replace(stage, config=placed(stage.config)) for stage in curriculum.stages)
    curriculum = replace(curriculum, stages=where, folder=where[0].config.output.folder)
    return stoppable(lambda: _run(curriculum, only=asked.stage, first=asked.from_stage))


def _started(curriculum: Curriculum, start: Path, named: str | None) -> Curriculum:
    """The stage ``named`` starts from the checkpoint ``start``."""
    if named is None:
        raise ConfigError(
            "--start names the checkpoint of a stage: give --stage or --from-stage too"
        )
    if not start.is_dir():
        raise ConfigError(f"--start {start} is not a checkpoint folder")
    stages = (replace(s, start=start) if s.name == named else s for s in curriculum.stages)
    return replace(curriculum, stages=tuple(stages))


def _begun(stage: Stage) -> RunConfig:
    """The stage's recipe with the checkpoint that it starts from, where that is known."""
    if stage.start is None:
        return stage.config
    model = stage.config.model.model_copy(update={"path": str(stage.start)})
    return stage.config.model_copy(update={"model": model})


def _run(curriculum: Curriculum, *, only: str | None, first: str | None) -> None:
    from rich.console import Console

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
        _remark(stage.by_hand)
        print(to_yaml(config))
    for stages, lines in _needs_of_stages(curriculum):
        print(f"# resources that {stages} asks for")
        _remark(lines)
    _show_missing(_begun(stage) for stage in curriculum.stages)
    for stage in curriculum.stages:
        _check_shared_gpu(_begun(stage))
    print(f"# curriculum folder {curriculum.folder}")
    for name in names:
        known = "has a result" if state.get(name) is not None else "to be run"
        if state.underway is not None and state.underway.name == name:
            known = f"begun: {state.underway.run}"
        print(f"#   {name:<34} {known if name in wanted else 'not asked for'}")
    return 0


def _needs_of_stages(curriculum: Curriculum) -> Iterator[tuple[str, list[str]]]:
    """What each stage asks for; stages that ask for the same, together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for stage in curriculum.stages:
        alike.setdefault(tuple(_needs(_begun(stage))), []).append(stage.name)
    for lines, names in alike.items():
        yield f"each of {', '.join(names)}" if len(names) > 1 else f"stage {names[0]}", list(lines)


def evaluate_checkpoint(
    checkpoint: Path, recipe: Path | None, overrides: Sequence[str], *, without: Sequence[Modality]
) -> int:
    """Accuracy by question type and need on the terminal. Of a run (a folder, or an id below runs/)
    its export is taken, and its own recipe unless one is named.

    Raises ConfigError for what is no checkpoint, before anything is made."""
    from avatar_rl.cluster.checkpoints.resume import named_run, reusable_config
    from avatar_rl.cluster.commands.doctor import preflight
    from avatar_rl.cluster.telemetry.live_view import open_screen
    from avatar_rl.cluster.telemetry.phase_times import times_of
    from avatar_rl.cluster.training.evaluate import evaluate

    run = named_run(Path("runs"), str(checkpoint))
    if recipe is not None:
        raw = read_recipe(recipe)
    elif run is not None:
        raw = reusable_config(run)
    else:
        raise ConfigError(
            f"{checkpoint} is not the folder or the id of a run: give --recipe RECIPE, whose data "
            "and rewards it is evaluated with"
        )
    recipe = recipe or checkpoint
    checkpoint = run or checkpoint
    common = {name: value for name, value in raw.items() if name not in CURRICULUM_KEYS}
    config = resolve_recipe(common, parse_overrides(overrides), source=str(recipe))
    checkpoint = policy_folder(checkpoint)
    base = config.model.base if is_adapter(checkpoint) else None
    model = config.model.model_copy(update={"path": str(checkpoint), "base": base})
    config = config.model_copy(update={"name": "evaluate", "cold_start": None, "model": model})
    if config.data.synthetic is None and config.data.heldout is None:
        raise ConfigError(f"recipe {recipe} has no held-out prompts: set data.heldout")
    preflight({"": config})
    with open_screen(config.screen, 1, title="evaluate", times=times_of(config)) as screen:
        result = evaluate(config, screen, without=[tuple(without)])
    [evaluation] = result.evaluations
    missing = f" without {' and '.join(without)}" if without else ""
    print(f"held-out accuracy{missing} {evaluation.accuracy:.3f} on {evaluation.prompts} prompts")
    for label, family in (("", evaluation.by_category), ("needs ", evaluation.by_need)):
        for name, value in family.items():
            print(f"  {label + name:<24} {value:.2f}")
    print(f"run folder   {result.run}")
    return 0


def policy_folder(path: Path) -> Path:
    """The model folder that is meant by ``path``: itself, or the export of a run."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a checkpoint folder")
    if (path / "config.json").is_file() or not (path / "status.json").is_file():
        return path
    export = path / "checkpoint"
    if not export.is_dir():
        raise ConfigError(
            f"{path} is a run without an export: finish it (`avatar runs resume {path}`) with "
            "output.export true, or name a model folder"
        )
    print(f"avatar: {path} is a run; its export {export} is evaluated", file=sys.stderr)
    return export
