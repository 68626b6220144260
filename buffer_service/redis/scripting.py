"""The atomic operations: Lua texts with their SHA, each the shared library plus one file of
scripts/."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files

import msgspec


class Script(msgspec.Struct, frozen=True):
    """One operation. EVALSHA by ``sha``; SCRIPT LOAD ``text`` when the server does not know it."""

    name: str
    text: str
    sha: str


@lru_cache
def script(name: str) -> Script:
    """The operation ``name`` (a file of scripts/ without .lua)."""
    folder = files(__package__) / "scripts"
    text = (folder / "lib.lua").read_text() + "\n" + (folder / f"{name}.lua").read_text()
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())
