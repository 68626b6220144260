"""`avatar explain KEY [RECIPE]`: what a key means, what it may be, what it is and why, where to
read on. And all of them at once: `--help-all`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.fields import (
    Key,
    all_keys,
    default_of,
    section_at,
    sections,
    type_of,
    written,
)
from avatar_rl.cluster.recipe.layers import Layers
from avatar_rl.cluster.recipe.load import parse_overrides, read_recipe
from avatar_rl.cluster.recipe.other_names import TABLES, Counterpart, counterpart
from avatar_rl.cluster.recipe.suggest import alike, same_name
from avatar_rl.common.config import subsection
from avatar_rl.common.errors import ConfigError

#: The page that tells of a section, the longest prefix counts.
PAGES = {
    "data": "docs/data.md",
    "data.synthetic": "docs/synthetic-world.md",
    "data.template": "docs/your-own-run.md",
    "loop": "docs/architecture.md",
    "cold_start": "docs/curriculum.md",
    "rollout": "docs/cluster.md",
    "rewards": "rewards/README.md",
    "buffer": "buffer_service/README.md",
    "buffer.hints": "docs/method.md",
    "learner": "docs/objective.md",
    "evaluation": "docs/output.md",
    "checkpoint": "docs/survival.md",
    "supervision": "docs/survival.md",
    "resources": "docs/cluster.md",
    "output": "docs/output.md",
}
WIDTH = 100


def explain(name: str, recipe: Path | None, preset: str | None, overrides: Sequence[str]) -> int:
    """Print what there is to say of a key, a section, or every key of that name.

    Raises ConfigError for a name that nothing resembles, with what may be meant."""
    name = name.removeprefix("--")
    layers = None
    if recipe is not None:
        raw = read_recipe(recipe)
        layers = Layers.of(raw, str(recipe), preset, parse_overrides(overrides))
    elif preset or overrides:
        layers = Layers.of({}, "", preset, parse_overrides(overrides))
    texts = [
        _section(key, layers) if isinstance(key, str) else _key(key, layers) for key in _meant(name)
    ]
    print("\n\n".join(texts))
    return 0


def help_all() -> str:
    """Every key with its type, default and meaning."""
    lines = ["Keys of a recipe, each an option of `avatar train` as well:"]
    for path, _, _ in [("", RunConfig, False), *sections(RunConfig)]:
        keys = [key for key in all_keys().values() if key.path.rpartition(".")[0] == path]
        if keys:
            lines += ["", path or "(top)", *(_row(key, "--") for key in keys)]
    return "\n".join(lines)


def _meant(name: str) -> list[Key | str]:
    """The keys that ``name`` may stand for; a section by its path."""
    if name in all_keys():
        return [all_keys()[name]]
    if section_at(name) is not None:
        return [name]
    row = counterpart(name, whole=True)
    if row is not None:
        return _theirs(row)
    if same := same_name(name):
        return [all_keys()[path] for path in same]
    if ends := [path for path, _, _ in sections(RunConfig) if path.endswith(f".{name}")]:
        return list(ends)
    row = counterpart(name)
    if row is not None:
        return _theirs(row)
    near = alike(name)
    meant = f"did you mean {' or '.join(near[:4])}?" if near else "`avatar schema` lists them all"
    raise ConfigError(f"no key of a recipe is called {name!r}: {meant}")


def _theirs(row: Counterpart) -> list[Key | str]:
    """What takes the place of another framework's key, which is said first."""
    print(f"{row}\n")
    if row.key in all_keys():
        return [all_keys()[row.key]]
    return [row.key] if row.key else []


def _key(key: Key, layers: Layers | None) -> str:
    rows = [("type", type_of(key.field).replace("`", ""))]
    rows.append(("default", default_of(key.field).replace("`", "")))
    if layers is not None:
        value, origin = layers.value(key.path)
        rows += [("value", written(value)), ("from", origin)]
    others = [
        row.name if framework == row.framework else ""
        for framework, table in TABLES.items()
        for row in table
        if row.key == key.path and framework in ("TRL", "verl", "ms-swift")
    ]
    if others:
        rows.append(("elsewhere", ", ".join(dict.fromkeys(others))))
    rows.append(("read on", f"{page_of(key.path)}; docs/configuration.md"))
    head = [key.path, *textwrap.wrap(key.description, WIDTH - 2)]
    body = [
        textwrap.fill(text, WIDTH, initial_indent=f"  {label:<10} ", subsequent_indent=" " * 13)
        for label, text in rows
    ]
    return "\n".join([head[0], *(f"  {line}" for line in head[1:]), *body])


def _section(path: str, layers: Layers | None) -> str:
    section = section_at(path)
    assert section is not None
    about = " ".join((section.__doc__ or "").split()).replace("``", "`")
    lines = [path, *(f"  {line}" for line in textwrap.wrap(about, WIDTH - 2))]
    for name in section.model_fields:
        dotted = f"{path}.{name}"
        if subsection(section, name) is not None:
            lines.append(f"  {dotted:<40} section")
            continue
        key = all_keys()[dotted]
        lines.append(_row(key, "") if layers is None else _valued(key, layers))
    return "\n".join([*lines, f"  read on: {page_of(path)}; docs/configuration.md"])


def _valued(key: Key, layers: Layers) -> str:
    value, origin = layers.value(key.path)
    return f"  {key.path:<40} {written(value)}  ({origin})"


def _row(key: Key, dashes: str) -> str:
    default = default_of(key.field).replace("`", "")
    text = f"{key.description} [{type_of(key.field).replace('`', '')}; default {default}]"
    head = f"  {dashes}{key.path:<38} "
    if len(head) > 43:
        return f"{head.rstrip()}\n" + textwrap.fill(
            text, WIDTH, initial_indent=" " * 43, subsequent_indent=" " * 43
        )
    return textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=" " * 43)


def page_of(path: str) -> str:
    """The documentation of a key's section."""
    while path and path not in PAGES:
        path = path.rpartition(".")[0]
    return PAGES.get(path, "docs/your-own-run.md")
