"""The atomic operations: each is one file of scripts/ behind the parts (scripts/parts/) that it
requires."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable

import msgspec

LAYOUT = 1  # of the keys in Redis; a run or a snapshot of another layout is refused
UNCHECKED = -1  # in place of a fencing token or a staleness bound; parts/base.lua has it too
_REQUIRES = "-- requires: "


class Script(msgspec.Struct, frozen=True):
    """One operation. EVALSHA by ``sha``; SCRIPT LOAD ``text`` when the server does not know it."""

    name: str
    text: str
    sha: str


def _collect(folder: Traversable, name: str, texts: dict[str, str]) -> None:
    """Adds the file ``name`` to ``texts``, behind the parts that its first line requires."""
    if name in texts:
        return
    text = (folder / f"{name}.lua").read_text()
    first = text.partition("\n")[0]
    if first.startswith(_REQUIRES):
        for part in first.removeprefix(_REQUIRES).split():
            _collect(folder, f"parts/{part}", texts)
    texts[name] = text


@lru_cache
def script(name: str) -> Script:
    """The operation ``name`` (a file of scripts/ without .lua)."""
    folder = files(__package__) / "scripts"
    texts: dict[str, str] = {}
    for file in ("parts/base", name):
        _collect(folder, file, texts)
    text = "\n".join(texts.values())
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())
