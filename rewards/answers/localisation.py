"""Answers that place things: "Left: cyclist / Center: girl" (docs/method.md 1.5)."""

from __future__ import annotations

import re
import unicodedata

from avatar_rl.common.text import normalise

_SEPARATOR = re.compile(r"[/;|\n,]")
_BULLET = re.compile(
    r"\s*(?:[-–—•·*]+(?!\d)\s*)?(?:\(?\d{1,2}[.)]\s*(?=[^\W\d]|\*))?"
)  # "-30" is a slot
_SAME = {"centre": "center", "middle": "center", "left side": "left", "right side": "right"}


def parse_slots(text: str) -> dict[str, str | None]:
    """Slot -> normalised value. A slot given twice with different values is None: it matches
    nothing.

    Slots are separated by "/", ";", "|", "," or a new line; a piece without a colon continues the
    value before it. Bullets and list numbers before a slot ("- Left", "1. Left") are no part of its
    name."""
    pieces: list[tuple[str, str]] = []
    for piece in _SEPARATOR.split(unicodedata.normalize("NFKC", text)):
        name, colon, value = piece.partition(":")
        if colon:
            slot = normalise(_BULLET.sub("", name, count=1))
            pieces.append((_SAME.get(slot, slot), value))
        elif pieces and piece.strip():
            pieces[-1] = (pieces[-1][0], f"{pieces[-1][1]}, {piece.strip()}")
    slots: dict[str, str | None] = {}
    for slot, value in pieces:
        filled = normalise(value) or None
        slots[slot] = filled if slots.get(slot, filled) == filled else None
    return slots


def localisation_score(answer: str, truth: str) -> float:
    """Share of slots with the right value, over the slots of truth and answer together, in [0, 1].

    An invented slot therefore costs. A truth without slots ("left") is compared as normalised text.
    """
    expected = parse_slots(truth)
    if not expected:
        return float(normalise(answer) == normalise(truth))
    given = parse_slots(answer)
    right = sum(
        1 for slot, value in expected.items() if value is not None and given.get(slot) == value
    )
    return right / len(expected.keys() | given.keys())
