"""Commands about recipes and their keys: `explain`, `schema`, `init`, `completion`. cli.py adds
them; the work is done in commands/keys/."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from avatar_rl.cluster.cli_types import (
    OVERRIDABLE,
    PATH,
    PRESET,
    RECIPE,
    Overridable,
    takes_overrides,
)
from avatar_rl.common.errors import ConfigError


@click.command(cls=Overridable, context_settings=OVERRIDABLE)
@click.argument("key")
@click.argument("recipe", type=RECIPE, required=False)
@click.option("--preset", type=PRESET, help="Lay a named method over the recipe.")
@takes_overrides
def explain(key: str, recipe: Path | None, preset: str | None, overrides: tuple[str, ...]) -> int:
    """What a key of a recipe means: type, bounds, default, documentation.

    With a RECIPE also its value, and whether the recipe, a preset or the command line set it. KEY
    may be a section, the last part of a key, or its name in TRL, verl or ms-swift.
    """
    from avatar_rl.cluster.commands.keys.explain import explain

    return explain(key, recipe, preset, overrides)


@click.command()
def schema() -> int:
    """Print the JSON schema of a recipe."""
    from avatar_rl.cluster.commands.keys.schema import print_schema

    return print_schema()


@click.command()
@click.argument("out", type=PATH, default=Path("recipe.yaml"))
@click.option("--model", metavar="FOLDER", help="Hugging Face checkpoint folder, or tiny.")
@click.option("--data", type=PATH, help="Training prompts (.jsonl, .json, .parquet, folder).")
@click.option("--heldout", type=PATH, help="Held-out prompts.")
@click.option("--gpus", type=click.IntRange(min=0), help="GPUs; those of this machine else.")
@click.option(
    "--gpu-memory", type=click.FloatRange(min=1), metavar="GIB", help="Memory of each GPU."
)
@click.option("--preset", type=PRESET, default="avatar", show_default=True, help="Named method.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--force", is_flag=True, help="Replace a recipe that is there.")
def init(
    out: Path,
    model: str | None,
    data: Path | None,
    heldout: Path | None,
    gpus: int | None,
    gpu_memory: float | None,
    preset: str,
    steps: int,
    force: bool,
) -> int:
    """Write a first recipe to OUT for a model, a dataset and a machine.

    On a terminal it asks for what is not given.
    """
    from avatar_rl.cluster.commands.keys.init import Wanted, machine, write
    from avatar_rl.cluster.recipe.presets import preset as named

    named(preset)
    if model is None:
        model = _asked("model", "Model: a Hugging Face checkpoint folder, or tiny", "tiny")
    if model != "tiny" and data is None:
        data = Path(_asked("data", "Training prompts (.jsonl, .json, .parquet)"))
        if heldout is None and sys.stdin.isatty():
            answer = click.prompt("Held-out prompts (empty for none)", default="", err=True)
            heldout = Path(answer) if answer else None
    found, size = machine() if gpus is None or gpu_memory is None else (0, 0.0)
    gpus = found if gpus is None else gpus
    size = gpu_memory * (1 << 30) if gpu_memory is not None else size or 80.0 * (1 << 30)
    path = model if model == "tiny" else str(PATH.convert(model, None, None))
    wanted = Wanted(path, data, heldout, gpus, size, preset, steps)
    return write(out, wanted, force=force)


def _asked(flag: str, question: str, default: str | None = None) -> str:
    """The answer on a terminal. Raises ConfigError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ConfigError(f"avatar init: give --{flag} (nobody can be asked here)")
    answer: str = click.prompt(question, default=default, err=True)
    return answer


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: Literal["bash", "zsh", "fish"]) -> int:
    """Print what makes a shell complete commands, options and keys.

    Put `eval "$(avatar completion bash)"` into ~/.bashrc (zsh: ~/.zshrc), or
    `avatar completion fish | source` into ~/.config/fish/config.fish.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(ctx.find_root().command, {}, "avatar", "_AVATAR_COMPLETE").source())
    return 0
