"""The command line: `avatar train`, `scale`, `doctor`, `data ...`, `buffer ...`, `presets`,
`runs`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.common.errors import AvatarError, ConfigError

# Quiet before anything heavy is imported; workers get theirs from cluster.services.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 success, 1 the user's input or the machine is at fault (one message), 130
    interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "runs", "evaluate", "doctor"):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        if options.command == "buffer":
            from avatar_rl.cluster.commands.buffer import run

            return run(options)
        return options.run(options, rest)
    except AvatarError as error:
        print(f"avatar: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("avatar: interrupted; everything that was started has been stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avatar", description="Reinforcement learning for audio-visual language models."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train", help="run a recipe", description="Overrides: --loop.steps 50 --learner.ranks 2"
    )
    train.add_argument("recipe", type=Path)
    train.add_argument(
        "--preset", help="lay a named method over the recipe (avatar presets lists them)"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and the resources; start nothing",
    )
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run: its id or folder, or auto for the newest unfinished one",
    )
    from avatar_rl.cluster.commands import curriculum as curriculum_commands

    curriculum_commands.add_train_options(train)
    train.set_defaults(run=_train)
    curriculum_commands.add_evaluate_parser(commands)

    presets = commands.add_parser("presets", help="list the named methods")
    presets.set_defaults(run=_presets)

    data = commands.add_parser("data", help="datasets").add_subparsers(
        dest="data_command", required=True
    )
    validate = data.add_parser("validate", help="check a dataset and its media")
    validate.add_argument("dataset", type=Path)
    validate.add_argument(
        "--recipe", type=Path, help="take data settings, context length and model from this recipe"
    )
    validate.add_argument("--no-decode", action="store_true", help="do not open the media files")
    validate.set_defaults(run=_validate)
    synthesize = data.add_parser("synthesize", help="write the synthetic audio-visual world")
    synthesize.add_argument("folder", type=Path)
    synthesize.add_argument("--recipe", type=Path, help="take data.synthetic from this recipe")
    synthesize.add_argument("--seed", type=int)
    synthesize.set_defaults(run=_synthesize)

    scale = commands.add_parser("scale", help="change how many rollout actors a run under way has")
    scale.add_argument(
        "scaled", metavar="run", help="run folder, or the id of a run below --folder"
    )
    scale.add_argument(
        "--folder", type=Path, default=Path("runs"), help="parent of the run folders"
    )
    scale.add_argument("--rollout-workers", type=int, required=True, metavar="N")
    scale.add_argument("--url", help="the run's Redis, where config.yaml does not say it")
    scale.set_defaults(run=_scale)

    doctor = commands.add_parser("doctor", help="check this machine, and what a recipe needs of it")
    doctor.add_argument(
        "recipe", type=Path, nargs="?", help="overrides may follow, as with `train`"
    )
    doctor.set_defaults(run=_doctor)

    from avatar_rl.cluster.commands import buffer as buffer_commands

    buffer_commands.add_parser(commands)

    from avatar_rl.cluster.commands import hints as hint_commands
    from avatar_rl.cluster.commands import runs as run_commands

    hint_commands.add_parser(commands)
    run_commands.add_parser(commands)
    return parser


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from avatar_rl.cluster.recipe.load import load_recipe, parse_overrides, read_recipe, to_yaml

    raw = read_recipe(options.recipe)
    if "stages" in raw:
        from avatar_rl.cluster.commands.curriculum import train_curriculum

        return train_curriculum(raw, options, rest)
    if options.stage or options.from_stage or options.start:
        raise ConfigError(
            f"recipe {options.recipe} has no stages: --stage, --from-stage and --start are for "
            "those"
        )
    config = load_recipe(options.recipe, parse_overrides(rest), preset_name=options.preset)
    if options.dry_run:
        from avatar_rl.cluster.recipe.resources import needs_of

        print(to_yaml(config))
        print("# resources this run asks for")
        for name, amount in needs_of(config).rows():
            print(f"#   {name:<34} {amount}")
        return 0
    from avatar_rl.cluster.commands.runs import train_and_summarise

    return train_and_summarise(config, options.resume)


def _presets(options: argparse.Namespace, rest: list[str]) -> int:
    from avatar_rl.cluster.recipe.presets import PRESETS

    for name, (meaning, _) in PRESETS.items():
        print(f"{name:<16} {meaning}")
    return 0


def _validate(options: argparse.Namespace, rest: list[str]) -> int:
    from avatar_rl.cluster.commands.data import validate_dataset

    return validate_dataset(options.dataset, recipe=options.recipe, decode=not options.no_decode)


def _synthesize(options: argparse.Namespace, rest: list[str]) -> int:
    from avatar_rl.cluster.commands.data import synthesize_world

    return synthesize_world(options.folder, recipe=options.recipe, seed=options.seed)


def _scale(options: argparse.Namespace, rest: list[str]) -> int:
    from avatar_rl.cluster.checkpoints.resume import named_run
    from avatar_rl.cluster.commands.scale import scale

    folder = named_run(options.folder, options.scaled)
    print(scale(folder or Path(options.scaled), options.rollout_workers, url=options.url))
    return 0


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    from avatar_rl.cluster.commands.doctor import examine, print_findings
    from avatar_rl.cluster.recipe.load import parse_overrides

    return print_findings(examine(options.recipe, parse_overrides(rest)))


if (
    __name__ == "__main__"
):  # `python -m cluster.cli` in a checkout: the one module is under the root
    from avatar_rl.cluster.cli import main as entry

    sys.exit(entry())
