"""The base class of every config section, and what becomes of a recipe's old keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import Json, JsonObject

log = logging.getLogger(__name__)
_warned: set[str] = set()
#: What people write to switch a path or a text off. Null is what does.
_NOTHING = frozenset({"no", "off", "none", "false", "nil"})


class Section(BaseModel):
    """Settings that cannot change and refuse unknown keys.

    ``ALIASES`` maps an old key to its new name: it still works, with one warning per process.
    ``REMOVED`` maps a key that is gone to what to do instead: it is refused with that sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ALIASES: ClassVar[Mapping[str, str]] = {}
    REMOVED: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename_old_keys(cls, raw: Json) -> Json:
        return current_keys(cls, raw) if isinstance(raw, dict) else raw

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Json | Path, info: ValidationInfo) -> Json | Path:
        """What pydantic would accept as something else: true as 1, `off` as a file's name."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("a number is due here, not true or false")
        is_nullable = NoneType in kinds and kinds & {str, Path}
        if isinstance(value, str) and is_nullable and value.strip().lower() in _NOTHING:
            raise ValueError("write null where nothing is meant")
        return expanded(value) if Path in kinds and isinstance(value, str | Path) else value

    @classmethod
    def recorded(cls, raw: JsonObject) -> Self:
        """The section that an older version of this program may have written down."""
        return cls.model_validate(current_keys(cls, raw, recorded=True))


def expanded(path: str | Path) -> str | Path:
    """``path`` with its leading ~ replaced by the home folder.

    Raises ValueError for a ~ without a home and for $VARIABLES, which a shell would replace.
    """
    text = str(path)
    if not text.strip():
        raise ValueError("the path is empty: write one, or null")
    if "\0" in text:
        raise ValueError("the path holds a NUL character")
    if text.startswith("$"):
        raise ValueError("variables are not replaced in a recipe: write the path itself")
    if not text.startswith("~"):
        return path
    try:
        return type(path)(Path(text).expanduser())
    except RuntimeError as error:
        raise ValueError("there is no such home folder: write the whole path") from error


def current_keys(
    section: type[Section], raw: JsonObject, *, recorded: bool = False, prefix: str = ""
) -> JsonObject:
    """``raw`` with today's names of its keys, at every depth. Other unknown keys stay.

    Do it before you lay one mapping over another: two names of one key do not override each other.

    Args:
        section: What ``raw`` is a part or all of.
        recorded: The mapping comes from an older version of this program, not from a user. Nobody
            is warned, and keys that are gone are left out.
        prefix: Dotted path of ``section``, for messages.

    Raises:
        ConfigError: A key is gone, or a key is given under both its names.
    """
    found: JsonObject = {}
    for key, value in raw.items():
        path = f"{prefix}{key}"
        name = str(key)
        if name not in section.model_fields:
            if remedy := section.REMOVED.get(name):
                if recorded:
                    continue
                raise ConfigError(f"{path} is no longer a key: {remedy}")
            if (new := section.ALIASES.get(name)) is not None:
                if new in raw:
                    raise ConfigError(
                        f"{path} is the old name of {prefix}{new}, and both are set: keep "
                        f"{prefix}{new}"
                    )
                if not recorded:
                    warn_once(path, f"{prefix}{new}")
                key = new
        inner = subsection(section, key)
        if inner is not None and isinstance(value, dict):
            value = current_keys(inner, value, recorded=recorded, prefix=f"{path}.")
        found[key] = value
    return found


@cache  # a class of settings stays as it is
def subsection(section: type[BaseModel], key: str) -> type[Section] | None:
    """The section behind ``key``, be it required or optional. None for a plain value."""
    if key not in section.model_fields:
        return None
    annotation = section.model_fields[key].annotation
    options = (annotation, *get_args(annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def warn_once(old: str, new: str) -> None:
    """Say once per process that a key has a new name."""
    if old in _warned:
        return
    _warned.add(old)
    log.warning("%s is called %s now; the old name goes with the next release", old, new)
