"""Numbers read out of an answer, and compared with the truth (docs/method.md 1.5)."""

from __future__ import annotations

import math
import re
from typing import Literal

NumericMode = Literal["rmae", "exact", "relative"]

_SCALES = {
    "dozen": 12.0,
    "hundred": 1e2,
    "thousand": 1e3,
    "million": 1e6,
    "billion": 1e9,
    "trillion": 1e12,
}
_SCALE = rf"(?:[\s-]+({'|'.join(_SCALES)})s?\b)?"
_FRAC = re.compile(
    r"(?<![\w.,])(?:(\d{1,9})\s*)?\\[dt]?frac\s*\{\s*([-+]?[\d.,]{1,30})\s*\}\s*\{\s*([\d.,]{1,30})\s*\}"
)
_UNIT_POWER = re.compile(
    r"(?<![a-z])([kcdmµμ]?m|m?s|ft|in|yd|mi|px)(\}?)\s*\^(?:-?[1-9]|\{\s*-?[1-9]\s*\})"
)
_NUMBER = re.compile(
    r"(?<![\w.])([-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)|\d+|(?=\.\d))"
    rf"(?:\.\d+)?(?:e[-+]?\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?){_SCALE}"
)
_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = tuple(f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine"))
_TENS = tuple(
    f"{stem}ty" for stem in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")
)
_VALUES = {
    name: float(value)
    for value, name in enumerate(("zero", *_ONES, "ten", "eleven", "twelve", *_TEENS))
}
_VALUES |= {name: 10.0 * value for value, name in enumerate(_TENS, 2)}
_ONE = "|".join(_ONES)
_NAME = re.compile(
    rf"\b((?:(?:{_ONE})[\s-]+hundred[\s-]+(?:and\s+)?)?(?:(?:{'|'.join(_TENS)})[\s-]+(?:{_ONE})|{'|'.join(_VALUES)}))"
    rf"\b{_SCALE}"
)
#: What changes the value of the numbers around it (each number stands as NUL): the text then states
#: no plain number.
_ALTERED = re.compile(
    r"[√∛∜π∞¼½¾⅐-⅞]|(?<![a-z\\])(?:sqrt|pi|(?:square|cube) root)(?![a-z])"
    r"|\\(?:[a-z]?frac|sqrt|pi|log|ln|lg|exp|sin|cos|tan)(?![a-z])"
    r"|\^(?!\s*\{?\s*(?:\\|°|(?:o|th|st|nd|rd)\b))"  # powers but 45^\circ, 5^{th}
    r"|\0[⁰¹²³⁴-⁹]|/\s*\0|\0[.,:][\0\d]"  # x/4; 1.000.000, 10:10
    r"|\0\s*(?:[-+*/×÷·⋅x]|\\times|\\cdot|\\div|point)\s*[\0\d]"
    r"|\b(?:minus|negative)\s+\0|\0[\s-]+(?:half|halves|thirds?|and\s+a\s+(?:half|quarter))\b"
    rf"|\b(?:{'|'.join(_SCALES)})\b"
)

#: Tolerance of the "relative" mode, as a share of the truth.
RELATIVE_TOLERANCE = 1e-3


def parse_number(text: str) -> float | None:
    """The one number a text states, or None: none at all, several different ones, a formula, or not
    finite.

    Reads signs, thousands separators (also blanks), exponents, fractions ("3/4", "3\\frac{1}{2}"),
    "5 million", units around it; "twenty-five", "one hundred" where no digits stand. "\\sqrt{2}",
    "4\\pi", "2^5", "1.000.000" are None."""
    plain = _FRAC.sub(_fraction, text.replace("−", "-").replace("–", "-").lower())
    plain = _UNIT_POWER.sub(r"\1\2", plain)
    found = {_scaled(_value(match[1]), match[2]) for match in _NUMBER.finditer(plain)}
    rest = _NUMBER.sub("\0", plain)
    if not found:
        found = {_scaled(_named(match[1]), match[2]) for match in _NAME.finditer(plain)}
        rest = _NAME.sub("\0", plain)
    if len(found) != 1 or _ALTERED.search(rest):  # several numbers are a hedge, not an answer
        return None
    (value,) = found
    return value


def _fraction(match: re.Match[str]) -> str:
    whole, above, below = match.groups()
    if whole is None:
        return f"{above}/{below}"
    if not (above + below).isdecimal():
        return match.group()
    return f"{int(whole) * int(below) + int(above)}/{below}"


def _value(literal: str) -> float | None:
    above, _, below = re.sub(r"[,\s]", "", literal).partition("/")
    divisor = float(below) if below else 1.0
    return None if divisor == 0.0 else float(above) / divisor


def _named(name: str) -> float:
    value = 0.0
    for word in re.split(r"[\s-]+", name):
        value = (
            value * 100.0 if word == "hundred" else value + _VALUES.get(word, 0.0)
        )  # "and" adds nothing
    return value


def _scaled(value: float | None, scale: str | None) -> float | None:
    if value is None:
        return None
    value *= _SCALES[scale] if scale else 1.0
    return value if math.isfinite(value) else None


def numeric_score(predicted: float, truth: float, mode: NumericMode) -> float:
    """Score in [0, 1] of a number against the true one.

    ``rmae``: 1 - min(1, |y_hat - y| / |y|), denominator 1 when y = 0; ``exact``: equal after
    rounding to two decimals; ``relative``: within 1e-3 of |y| (of 1 when y = 0)."""
    if mode == "exact":
        return float(round(predicted, 2) == round(truth, 2))
    scale = abs(truth) or 1.0
    error = abs(predicted - truth) / scale
    if mode == "relative":
        # One part in 1e12 of slack: a difference of exactly 1e-3 is not representable.
        return float(error <= RELATIVE_TOLERANCE * (1 + 1e-12))
    return 1.0 - min(1.0, error)
