"""Answers that are sets of labels: "dog, rain" or "A, C" (docs/method.md 1.5)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from avatar_rl.rewards.answers.choice import choice_letter
from avatar_rl.rewards.answers.text import f1, normalise

_SEPARATOR = re.compile(r"[,;/|\n]|\band\b", re.IGNORECASE)
_RUN_OF_LETTERS = re.compile(r"[A-Z]{2,10}")


def parse_labels(text: str, options: Sequence[str]) -> frozenset[str]:
    """Normalised labels; with options, whatever names one becomes its letter ("AC" too)."""
    stripped = text.strip()
    pieces = (
        list(stripped)
        if options and _RUN_OF_LETTERS.fullmatch(stripped)
        else _SEPARATOR.split(stripped)
    )
    labels = set()
    for piece in pieces:
        letter = choice_letter(piece, options) if options and piece.strip() else None
        label = letter or normalise(piece)
        if label:
            labels.add(label)
    return frozenset(labels)


def multi_label_score(answer: str, truth: str, options: Sequence[str]) -> float:
    """F1 of the two label sets in [0, 1]; two empty sets agree."""
    given, expected = parse_labels(answer, options), parse_labels(truth, options)
    if not given and not expected:
        return 1.0
    return f1(len(given & expected), len(given), len(expected))
