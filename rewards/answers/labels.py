"""Answers that are sets of labels: "dog, rain" or "A, C" (docs/method.md 1.5)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from avatar_rl.prompts.choices import choice_letter, option_texts
from avatar_rl.rewards.answers.text import f1, normalise

#: Signs between labels, also where words do without spaces; "R&B" and "C++" are labels.
_SEPARATOR = re.compile(
    r"[,;/|\n、،·•؛।]|\band\b|\s[&+]\s|(?<=\S)(?:以及|和|与|與|及|と|및|와|과(?=\s))(?=\S)",
    re.IGNORECASE,
)
_BETWEEN_LETTERS = re.compile(r"[\s,;/|&+.、·()\[\]]+|\band\b|和|与|與|及|と", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*•·–—]\s+|\(?\d{1,2}[.)]\s+)", re.MULTILINE)
_BOXED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_INTRODUCED = re.compile(
    r"^\W*(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:answers?|options?|choices?|labels?|letters?)"
    r"(?:\s+(?:are|is))?\s*:?|(?:正确)?(?:答案|选项)(?:是|为)?:?|选)\s*(?=[\w(])",
    re.IGNORECASE,
)


def parse_labels(text: str, options: Sequence[str]) -> frozenset[str]:
    """Normalised labels of "dog, cat", "- dog\n- cat", "狗、猫"; with options, what names one becomes
    its letter ("A, C", "AC", "A & C", "Options A and C" too)."""
    plain = _BULLET.sub("", unicodedata.normalize("NFKC", text)).strip().strip("$*")
    while (unboxed := _BOXED.sub(r"\1", plain)) != plain:
        plain = unboxed.strip("$ ")
    if options:
        plain = _INTRODUCED.sub("", plain)
        if letters := _letters_only(plain, options):
            return letters
    labels = set()
    for piece in _SEPARATOR.split(plain):
        piece = _BULLET.sub("", piece)
        letter = choice_letter(piece, options) if options and piece.strip() else None
        label = letter or normalise(piece)
        if label:
            labels.add(label)
    return frozenset(labels)


def _letters_only(text: str, options: Sequence[str]) -> frozenset[str] | None:
    """The options of an answer that is nothing but their letters: "AC", "ac", "(A)(C)", "A C"."""
    known = option_texts(options)
    if normalise(text) in known.values():
        return None  # the text of an option that happens to be made of letters
    parts = [part for part in _BETWEEN_LETTERS.split(text.strip(" .。")) if part]
    if len(parts) == 1 and 2 <= len(parts[0]) <= len(known):
        parts = list(parts[0])
    letters = [part.upper() for part in parts]
    if not letters or len(set(letters)) != len(letters) or not set(letters) <= known.keys():
        return None
    return frozenset(letters)


def multi_label_score(answer: str, truth: str, options: Sequence[str]) -> float:
    """F1 of the two label sets in [0, 1]; two empty sets agree."""
    given, expected = parse_labels(answer, options), parse_labels(truth, options)
    if not given and not expected:
        return 1.0
    return f1(len(given & expected), len(given), len(expected))
