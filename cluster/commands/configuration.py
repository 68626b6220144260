"""The reference page of all config keys, from their own descriptions.

``python -m avatar_rl.cluster.commands.configuration > docs/configuration.md`` writes it anew.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.curriculum.stages import StageConfig
from avatar_rl.common.config import Section, subsection
from avatar_rl.common.types import Json

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

_PLAIN = {str: "text", Path: "path", bool: "true or false", int: "integer", float: "number"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
_UNITS = ((30, "GiB"), (20, "MiB"), (0, "bytes"))


def reference() -> str:
    """docs/configuration.md."""
    parts = [_INTRO, "## The recipe", *_described(RunConfig, "", RunConfig.__doc__)]
    for path, section, optional in sections(RunConfig):
        heading = f"## `{path}`" + (" (left out unless given)" if optional else "")
        parts += [heading, *_described(section, f"{path}.", section.__doc__)]
    parts += ["## `stages`", *_described(StageConfig, "stages[].", _STAGES)]
    parts += ["## Old keys", _old_keys()]
    return "\n\n".join(parts) + "\n"


def sections(root: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section], bool]]:
    """(dotted path, section, whether it may be null) of all sections below ``root``, in order."""
    for key, field in root.model_fields.items():
        inner = subsection(root, key)
        if inner is not None:
            yield f"{prefix}{key}", inner, NoneType in get_args(field.annotation)
            yield from sections(inner, f"{prefix}{key}.")


def _described(section: type[Section], prefix: str, about: str | None) -> list[str]:
    rows = [
        f"| `{prefix}{key}` | {_type_of(field)} | {_default_of(field)} | {_cell(field)} |"
        for key, field in section.model_fields.items()
        if subsection(section, key) is None
    ]
    text = inspect.cleandoc(about or "").replace("``", "`")
    table = ["| Key | Type | Default | What it does |", "|---|---|---|---|", *rows]
    return [text] + (["\n".join(table)] if rows else [])


def _cell(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _type_of(field: FieldInfo) -> str:
    """A field's type and bounds in words."""
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _BOUNDS
        if getattr(rule, name, None) is not None
    ]
    options = get_args(field.annotation)
    given = [option for option in options if option is not NoneType]
    optional = NoneType in options and len(given) == 1
    words = [_words(given[0] if optional else field.annotation), ", ".join(bounds)]
    return " ".join(filter(None, [*words, "or null" if optional else ""]))


def _words(annotation: object) -> str:
    options = get_args(annotation)
    origin = get_origin(annotation)
    if annotation is None or annotation is NoneType:
        return "null"
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in options)
    if origin is tuple:
        inner = [_words(option) for option in options if option is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in options else f"[{', '.join(inner)}]"
    if origin is dict:
        return f"mapping of {_words(options[0])} to {_words(options[1])}"
    if options:  # a union
        return " or ".join(_words(option) for option in options)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{option.value}`" for option in annotation)
    return next((word for plain, word in _PLAIN.items() if annotation is plain), "any")


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value == "":
        return "empty"
    plain = to_jsonable_python(value)
    written = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1_000)
    return f"`{written.removesuffix(chr(10)).removesuffix('...').strip()}`{_size(value)}"


def _size(value: Json) -> str:
    """Large powers of two in a unit that can be read."""
    if not isinstance(value, int) or value < 1 << 20:
        return ""
    bits, unit = next((bits, unit) for bits, unit in _UNITS if value % (1 << bits) == 0)
    return f" ({value >> bits} {unit})"


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
