"""Every key of a recipe: where it stands, its type and bounds in words, its default."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.config import Section, subsection
from avatar_rl.common.types import Json

_PLAIN = {str: "text", Path: "path", bool: "true or false", int: "integer", float: "number"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
_UNITS = ((30, "GiB"), (20, "MiB"), (0, "bytes"))


@dataclass(frozen=True)
class Key:
    """One key of a recipe that has a value of its own."""

    path: str  # dotted
    field: FieldInfo

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def description(self) -> str:
        return self.field.description or ""


@cache  # it is asked for each key of a recipe
def sections(root: type[Section], prefix: str = "") -> tuple[tuple[str, type[Section], bool], ...]:
    """(dotted path, section, whether it may be null) of all sections below ``root``, in order."""
    found: list[tuple[str, type[Section], bool]] = []
    for key, field in root.model_fields.items():
        inner = subsection(root, key)
        if inner is not None:
            found.append((f"{prefix}{key}", inner, NoneType in get_args(field.annotation)))
            found += sections(inner, f"{prefix}{key}.")
    return tuple(found)


@cache
def all_keys() -> dict[str, Key]:
    """Every key with a value of its own by its dotted path, in the order of docs/configuration.md.
    Sections are not among them."""
    found: dict[str, Key] = {}
    inner = [(f"{path}.", section) for path, section, _ in sections(RunConfig)]
    whole: list[tuple[str, type[Section]]] = [("", RunConfig), *inner]
    for prefix, section in whole:
        for name, field in section.model_fields.items():
            if subsection(section, name) is None:
                found[prefix + name] = Key(prefix + name, field)
    return found


def section_at(path: str) -> type[Section] | None:
    """The section at a dotted path, "" being the recipe. None for a key with a value of its own and
    for what is not there."""
    section: type[Section] | None = RunConfig
    for name in path.split(".") if path else []:
        section = None if section is None else subsection(section, name)
    return section


def type_of(field: FieldInfo) -> str:
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


def default_of(field: FieldInfo) -> str:
    """The default as it would be written, large sizes with their unit; "required" without one."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "empty" if value == "" else f"`{written(value)}`{_size(value)}"


def written(value: Any) -> str:
    """A value as one line of YAML."""
    plain = to_jsonable_python(value)
    text: str = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1_000)
    return text.removesuffix("\n").removesuffix("...").strip()


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


def _size(value: Json) -> str:
    """Large powers of two in a unit that can be read."""
    if not isinstance(value, int) or value < 1 << 20:
        return ""
    bits, unit = next((bits, unit) for bits, unit in _UNITS if value % (1 << bits) == 0)
    return f" ({value >> bits} {unit})"
