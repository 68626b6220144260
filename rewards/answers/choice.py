"""The letter of a multiple-choice answer (docs/method.md 1.5)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from avatar_rl.rewards.answers.text import normalise

_OPTION = re.compile(r"\s*\(?([A-Za-z])[.):]\s*(.*)", re.DOTALL)
_OPEN = r"(?:[\s*_$\"'`(\[]|\\[(\[]|\\(?:boxed|text|textbf|mathrm|mathbf)\{){0,16}"
_LEAD = re.compile(
    rf"{_OPEN}(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?[\s:]{{0,16}}(?:(?:the )?option )?)?{_OPEN}"
    r"([A-Za-z])(?![A-Za-z])((?:\\[)\]]|[\s*_\"'`)\]}$.:–—-])*)",
    re.IGNORECASE,
)
_FURTHER = re.compile(r"(?<![A-Za-z])([A-Z])(?=\s*(?:[.,;:)\]/&\\}$*]|$|or\b|and\b)|\s+[–—-]\s)")
_SAYS_SO = re.compile(r"is (?:the )?(?:correct|right)(?: (?:answer|option|choice|one))?")


def option_texts(options: Sequence[str]) -> dict[str, str]:
    """Letter -> normalised text; options without a letter are numbered A, B, ... by position."""
    table: dict[str, str] = {}
    for position, option in enumerate(options):
        match = _OPTION.match(unicodedata.normalize("NFKC", option))
        letter, text = (
            (match.group(1).upper(), match.group(2))
            if match
            else (chr(ord("A") + position), option)
        )
        table[letter] = normalise(text)
    return table


def choice_letter(answer: str, options: Sequence[str]) -> str | None:
    """The one option an answer names, as an upper-case letter; None when it names none or hedges.

    Accepts "B", "(b)", "B. red", "B - red", "Option B", "The answer is B", "B is correct",
    "\\boxed{B}", "\\(B\\)", a full-width letter, and the text of exactly one option. Refuses "A or
    B", "A. B. C.", a letter with another option's text, and letters beyond the options."""
    answer = unicodedata.normalize("NFKC", answer)
    table = option_texts(options)
    text = normalise(answer)
    by_text = [letter for letter, option in table.items() if option == text]
    if len(by_text) == 1 and not (len(text) == 1 and text.isalpha()):
        return by_text[0]
    match = _LEAD.match(answer)
    if match is None:
        return None
    letter, rest = match.group(1).upper(), answer[match.end() :]
    if table and letter not in table:
        return None
    described = normalise(rest)
    if not described or table.get(letter) == described or _SAYS_SO.fullmatch(described):
        return letter
    separated = any(mark in match.group(2) for mark in ".):")
    hedged = described in table.values() or any(other != letter for other in _FURTHER.findall(rest))
    return (
        letter if separated and not hedged else None
    )  # without a mark, "A red ball" is an article
