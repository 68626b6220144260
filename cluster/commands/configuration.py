"""The reference page of all config keys, from their own descriptions.

``python -m avatar_rl.cluster.commands.configuration > docs/configuration.md`` writes it anew.
"""

from __future__ import annotations

import inspect
import sys

from pydantic.fields import FieldInfo

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.curriculum.stages import StageConfig
from avatar_rl.cluster.recipe.fields import default_of, sections, type_of
from avatar_rl.common.config import Section, subsection

_INTRO = """# Configuration

Every key of a recipe: its type, its default and what it does. This page is generated from the
code; `python -m avatar_rl.cluster.commands.configuration > docs/configuration.md` writes it anew.

A recipe is a YAML file of these sections. A key can also be set on the command line by its dotted
path: `avatar train recipes/local.yaml --learner.optimizer.lr 1e-6`. A preset (`avatar presets`)
that a recipe names lies below the recipe's own keys; `--preset` lies above them. The command line
lies above both. Unknown keys are refused."""

_STAGES = """A recipe with `stages` is a curriculum: a list of stages, each with the keys below. The
keys of `data.select` stand below a stage's `select`. With `modality_check: true` beside `stages`
the last policy is also measured without sight and without sound."""


def reference() -> str:
    """docs/configuration.md."""
    parts = [_INTRO, "## The recipe", *_described(RunConfig, "", RunConfig.__doc__)]
    for path, section, optional in sections(RunConfig):
        heading = f"## `{path}`" + (" (left out unless given)" if optional else "")
        parts += [heading, *_described(section, f"{path}.", section.__doc__)]
    parts += ["## `stages`", *_described(StageConfig, "stages[].", _STAGES)]
    parts += ["## Old keys", _old_keys()]
    return "\n\n".join(parts) + "\n"


def _described(section: type[Section], prefix: str, about: str | None) -> list[str]:
    rows = [
        f"| `{prefix}{key}` | {type_of(field)} | {default_of(field)} | {_cell(field)} |"
        for key, field in section.model_fields.items()
        if subsection(section, key) is None
    ]
    text = inspect.cleandoc(about or "").replace("``", "`")
    table = ["| Key | Type | Default | What it does |", "|---|---|---|---|", *rows]
    return [text] + (["\n".join(table)] if rows else [])


def _cell(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _old_keys() -> str:
    rows = []
    for path, section, _ in sections(RunConfig):
        rows += [
            f"| `{path}.{old}` | now `{path}.{new}`; the old name still works, with a warning |"
            for old, new in section.ALIASES.items()
        ]
        rows += [
            f"| `{path}.{old}` | refused: {remedy} |" for old, remedy in section.REMOVED.items()
        ]
    return "\n".join(["| Key | What became of it |", "|---|---|", *rows])


def main() -> None:
    sys.stdout.write(reference())


if __name__ == "__main__":
    main()
