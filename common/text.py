"""Text in its normal form, and short enough to be shown."""

from __future__ import annotations

import unicodedata

_EDGE = " \t\r\n.,;:!?\"'`*_()[]{}$“”‘’。，"
_ARTICLES = ("a ", "an ", "the ")


def normalise(text: str) -> str:
    """Normal form for equality: NFKC, case folded, one space between words, no outer punctuation or
    leading article."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGE)
    for article in _ARTICLES:
        if folded.startswith(article):
            return folded[len(article) :].strip(_EDGE)
    return folded


def shortened(text: str, most: int = 160) -> str:
    """``text`` with its middle left out where it is longer than ``most`` characters: a value of a
    dataset can be a whole file."""
    if len(text) <= most:
        return text
    return f"{text[: most - 40]}... ({len(text)} characters) ...{text[-12:]}"
