"""Words of the command line that several commands take: recipes, paths, overrides."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
from click.shell_completion import CompletionItem

from avatar_rl.common.config import expanded

Command = Callable[..., int]


class RecipePath(click.ParamType):
    """A recipe here or, for `recipes/...`, in the package."""

    name = "recipe"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        from avatar_rl.cluster.recipe.load import find_recipe

        if str(value).startswith("--"):
            self.fail(f"{value} stands where the recipe should: overrides follow it", param, ctx)
        path = PATH.convert(value, param, ctx)
        found = find_recipe(path)
        if found != path:
            print(f"avatar: {path} is not here; taken from the package: {found}", file=sys.stderr)
        return found

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class HomePath(click.ParamType):
    """A path. A shell leaves the ~ of `--folder=~/runs` to us."""

    name = "path"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        try:
            return Path(expanded(value))
        except ValueError as error:
            self.fail(f"{value}: {error}", param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Overridable(click.Command):
    """A command that takes the keys of a recipe as options; a shell completes them, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises UsageError for an empty value, as a shell variable that is not set leaves it."""
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            if value == "":
                raise click.UsageError(f"--{name.replace('_', '-')} has no value", ctx)
        return rest

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("--"):
            return found
        from avatar_rl.cluster.recipe.fields import all_keys

        wanted = incomplete.removeprefix("--")
        return found + [
            CompletionItem(f"--{path}", help=key.description)
            for path, key in all_keys().items()
            if path.startswith(wanted)
        ]


class PresetName(click.ParamType):
    """A named method; the recipe's loader says which there are."""

    name = "preset"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from avatar_rl.cluster.recipe.presets import PRESETS

        return [
            CompletionItem(name, help=preset.meaning)
            for name, preset in PRESETS.items()
            if name.startswith(incomplete)
        ]


RECIPE = RecipePath()
PATH = HomePath()
PRESET = PresetName()
#: Of a command that takes `--learner.optimizer.lr 1e-4` and the like after its own words.
OVERRIDABLE = {"ignore_unknown_options": True}


def takes_overrides(command: Command) -> Command:
    return click.argument("overrides", nargs=-1, type=click.UNPROCESSED)(command)


Declared = TypeVar("Declared", bound=Callable[..., object])


def helps_all(command: Declared) -> Declared:
    """``--help-all``: the command's own help, then every key of a recipe."""

    def show(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if not asked or ctx.resilient_parsing:
            return
        from avatar_rl.cluster.commands.keys.explain import help_all

        click.echo(f"{ctx.get_help()}\n\n{help_all()}")
        ctx.exit()

    return click.option(
        "--help-all",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show this message and every key of a recipe, and exit.",
    )(command)
