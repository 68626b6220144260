"""What may be meant by a key that no recipe has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache

from avatar_rl.cluster.recipe.fields import all_keys
from avatar_rl.cluster.recipe.other_names import TABLES, counterpart
from avatar_rl.common.types import ReadOnlyJson

#: Similarity from which a name beside the wrong one is surely meant, and one elsewhere may be.
SURE, ELSEWHERE = 0.8, 0.75
#: Keys named at most.
MOST = 4


def suggestion(location: str, value: ReadOnlyJson, known: Sequence[str]) -> str:
    """The remedy for an unknown key of a recipe, in words.

    Tried in turn: a name much like it in the same section, what TRL, verl or ms-swift call so, the
    same name in another section, a name somewhat like it here, one elsewhere.

    Args:
        location: Dotted path of the unknown key.
        value: What it was set to.
        known: Names of the keys of its section.
    """
    leaf = location.rpartition(".")[2]
    near = difflib.get_close_matches(leaf, known, n=1, cutoff=SURE)
    if near:
        return f"did you mean {near[0]!r}?"
    if foreign := _foreign(location, value, whole=True):
        return foreign
    parts = [name for name in known if leaf in name.split("_")]
    if len(parts) == 1:
        return f"did you mean {parts[0]!r}?"
    if same := same_name(location, value):
        return f"did you mean {_listed(same)}?"
    if foreign := _foreign(location, value, whole=False):
        return foreign
    near = difflib.get_close_matches(leaf, known, n=1)
    elsewhere = _names_like(leaf)
    if elsewhere and not (near and _likeness(leaf, near[0]) > _likeness(leaf, elsewhere[0])):
        return f"did you mean {_listed(alike(leaf))}?"
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


def same_name(location: str, value: ReadOnlyJson = None) -> list[str]:
    """Keys that end as ``location`` does, or as the names inside ``value`` do."""
    first, names = location.partition(".")[0], [*_flat(location, value)]
    for ends in ([f".{name}" for name in names], [f".{_last(name)}" for name in names]):
        found = [path for path in all_keys() if path.endswith(tuple(ends))]
        if found:  # of the same section first, of the cold start last
            return sorted(
                found,
                key=lambda path: (not path.startswith(f"{first}."), path.startswith("cold_start")),
            )
    return []


def alike(name: str) -> list[str]:
    """Keys whose last name, here or in another framework, is much like ``name``, best first."""
    called = _called()
    return list(dict.fromkeys(path for one in _names_like(_last(name)) for path in called[one]))


def _names_like(leaf: str) -> list[str]:
    return difflib.get_close_matches(leaf, sorted(_called()), n=MOST, cutoff=ELSEWHERE)


@cache
def _called() -> dict[str, list[str]]:
    """Last names of keys, ours and those of other frameworks, with the keys that they mean."""
    called: dict[str, list[str]] = {}
    for path, key in all_keys().items():
        called.setdefault(key.leaf, []).append(path)
    for row in (row for table in TABLES.values() for row in table if row.key):
        called.setdefault(_last(row.name), [row.key])
    return called


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()


def _foreign(location: str, value: ReadOnlyJson, *, whole: bool) -> str:
    """What other frameworks mean by it, by its ``whole`` name or by the last part of a dotted one;
    empty where none has it."""
    rows = [
        counterpart(name, whole=whole) or counterpart(_last(name), whole=whole)
        for name in _flat(location, value)
    ]
    return "; ".join(str(row) for row in rows[:MOST] if row is not None)


def _flat(location: str, value: ReadOnlyJson) -> Iterator[str]:
    """Dotted names of the plain values inside a mapping; ``location`` itself for a plain value."""
    if not isinstance(value, dict) or not value:
        yield location
        return
    for name, inner in value.items():
        yield from _flat(f"{location}.{name}", inner)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(paths: Sequence[str]) -> str:
    shown = " or ".join(repr(path) for path in paths[:MOST])
    return shown + (f" or {len(paths) - MOST} more" if len(paths) > MOST else "")
