"""The atomic operations: each is one file of scripts/ with the parts (scripts/parts/) that it
requires.

A part stands where a line of the file requires it. Redis makes the functions of a script anew in
each call, so those that only a rare way needs are required behind the return of the usual one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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


def _lines(folder: Traversable, name: str, included: set[str]) -> Iterator[str]:
    """The lines of the file ``name``. A line that requires parts is followed by those that have not
    been ``included`` before it. It stands outside of blocks, so that all below sees them."""
    for line in (folder / f"{name}.lua").read_text().splitlines():
        yield line
        if line.startswith(_REQUIRES):
            for part in line.removeprefix(_REQUIRES).split():
                if part not in included:
                    included.add(part)
                    yield from _lines(folder, f"parts/{part}", included)


@lru_cache
def script(name: str) -> Script:
    """The operation ``name`` (a file of scripts/ without .lua)."""
    folder = files(__package__) / "scripts"
    included: set[str] = set()
    text = "\n".join(
        line for file in ("parts/base", name) for line in _lines(folder, file, included)
    )
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())
