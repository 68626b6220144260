"""From a YAML recipe, a preset and dotted overrides to a checked RunConfig."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.overlays import Overlay, lay, merge, nested
from avatar_rl.cluster.recipe.presets import by_hand, stated
from avatar_rl.cluster.recipe.suggest import suggestion
from avatar_rl.cluster.recipe.yaml_text import parse_yaml, read_yaml
from avatar_rl.common.config import current_keys, subsection
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import Json


def load_recipe(
    path: Path, overrides: Sequence[tuple[str, str]] = (), *, preset_name: str | None = None
) -> RunConfig:
    """Preset < recipe < overrides. A preset named on the command line replaces the recipe's.

    Raises ConfigError for a missing file, bad YAML, unknown keys (with the nearest known one) and
    bad values."""
    raw = read_recipe(path)
    if "stages" in raw:
        raise ConfigError(
            f"recipe {path} is a curriculum (it has stages): only `avatar train` runs those"
        )
    return resolve_recipe(raw, overrides, preset_name=preset_name, source=str(path))


def resolve_recipe(
    raw: Overlay,
    overrides: Sequence[tuple[str, str]],
    *,
    preset_name: str | None = None,
    source: str,
) -> RunConfig:
    """``load_recipe`` for a mapping that was read."""
    return check(
        overridden(over_preset(renamed(raw, source), preset_name), overrides), source=source
    )


def over_preset(hand: Overlay, preset_name: str | None = None) -> Overlay:
    """What is given by hand, over the preset that is named: ``preset_name``, else its own. What
    the preset does not state is left to the schema's defaults, which are the preset's too."""
    name = preset_name or hand.get("preset")
    return lay(stated(str(name)), {**hand, "preset": name}) if name else hand


def against_preset(hand: Overlay, preset_name: str | None = None) -> list[str]:
    """A line for each key that was given by hand against the preset: the hand wins, and is
    shown."""
    name = preset_name or hand.get("preset")
    if not name:
        return []
    return [
        f"{key}: {json.dumps(mine)} by hand, {json.dumps(theirs)} in preset {name}"
        for key, mine, theirs in by_hand(str(name), hand)
    ]


def find_recipe(path: Path) -> Path:
    """``path``, or the recipe of the package that a `recipes/...` means where no such file is here;
    an installed package carries its recipes along."""
    packaged = Path(__file__).parents[2] / path
    is_named = not path.is_absolute() and path.parts[:1] == ("recipes",)
    return packaged if is_named and not path.exists() and packaged.exists() else path


def read_recipe(path: Path) -> Overlay:
    """The YAML mapping of a recipe, unchecked. Raises ConfigError for a missing file, bad YAML and
    other documents."""
    if path.is_dir():
        raise ConfigError(f"recipe {path} is a folder: name the .yaml file in it")
    if not path.is_file():
        near = (
            sorted(file.as_posix() for file in path.parent.glob("*.yaml"))
            if path.parent.is_dir()
            else []
        )
        raise ConfigError(
            f"recipe {path} does not exist" + (f": there are {', '.join(near)}" if near else "")
        )
    raw = read_yaml(path, "recipe") or {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"recipe {path} must be a mapping of sections, found {type(raw).__name__}"
        )
    return raw


def check(raw: Overlay, *, source: str) -> RunConfig:
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [explain(item) for item in error.errors()]
        raise ConfigError(f"recipe {source}:\n  " + "\n  ".join(lines)) from error


def renamed(raw: Overlay, source: str) -> Overlay:
    """``raw`` under today's keys. Raises ConfigError for keys that are gone, with what to do."""
    try:
        return current_keys(RunConfig, raw)
    except ConfigError as error:
        raise ConfigError(f"recipe {source}:\n  {error}") from error


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """``--learner.lr 1e-4`` and ``--learner.lr=1e-4`` as (key, text) pairs."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(
                f"unexpected argument {flag!r}: overrides look like --learner.optimizer.lr 1e-4"
            )
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"override --{key} has no value: write --{key} VALUE")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration; secrets are masked by their own types."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def overridden(raw: Overlay, overrides: Sequence[tuple[str, str]]) -> Overlay:
    """``raw`` under dotted keys with YAML values; a mapping is merged into what is there, and {}
    empties it."""
    for key, text in overrides:
        try:
            value: Json = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override --{key} {text!r} is not a YAML value: {error}") from error
        if value == {}:
            raw = merge(raw, current_keys(RunConfig, nested(key, None)))
        raw = lay(raw, current_keys(RunConfig, nested(key, value)), replaces_weights=False)
    return raw


def explain(item: ErrorDetails, root: type[BaseModel] = RunConfig) -> str:
    """One readable line per pydantic error of a ``root``."""
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "model_type" and (keys := _fields(item["loc"], root)):
        return (
            f"{location}: a section of keys ({', '.join(keys)}) cannot be {item['input']!r}; "
            f"--{location}.{keys[0]} sets one of them"
        )
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        given = (
            f" (given: {item['input']!r})"
            if not isinstance(item["input"], dict | BaseModel)
            else ""
        )
        remedy = ", write it in quotes" if item["type"] == "string_type" else ""
        where = f"{location}: " if location else ""
        return f"{where}{message}{given}{remedy}"
    *parents, leaf = item["loc"]
    known = _fields(parents, root)
    if root is RunConfig:
        return f"{location}: unknown key, {suggestion(location, item['input'], known)}"
    near = difflib.get_close_matches(str(leaf), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"{location}: unknown key, {remedy}"


def _fields(parents: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    """Field names of the section at ``parents``, following optional sections."""
    section: type[BaseModel] | None = root
    for part in parents:
        section = subsection(section, str(part)) if section is not None else None
    return list(section.model_fields) if section is not None else []
