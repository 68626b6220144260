"""Text in its normal form, and short enough to be shown."""

from __future__ import annotations

import unicodedata

_EDGE = " \t\r\n.,;:!?\"'`*_()[]{}$“”‘’。，"
#: Marks that turn the direction of the text after them.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ARTICLES = ("a ", "an ", "the ")


def normalise(text: str) -> str:
    """Normal form for equality: NFKC, case folded, one space between words, no outer punctuation or
    leading article."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGE)
    for article in _ARTICLES:
        if folded.startswith(article):
            return folded[len(article) :].strip(_EDGE)
    return folded


def printable(text: str) -> str:
    """``text`` as a terminal may show it: control characters are spelled out (\\x1b), but for line
    ends and tabs. Text of a dataset could else move the cursor, retitle or clear the screen."""
    return "".join(
        letter.encode("unicode_escape").decode() if _is_control(letter) else letter
        for letter in text
    )


def _is_control(letter: str) -> bool:
    is_plain = letter in "\n\t" or letter.isprintable()
    return not is_plain and (letter in _TURNS or unicodedata.category(letter) in ("Cc", "Cs"))


def shortened(text: str, most: int = 160) -> str:
    """``text`` with its middle left out where it is longer than ``most`` characters: a value of a
    dataset can be a whole file."""
    if len(text) <= most:
        return text
    return f"{text[: most - 40]}... ({len(text)} characters) ...{text[-12:]}"
