"""Numbers read out of an answer, and compared with the truth (METHOD 1.5)."""

from __future__ import annotations

import math
import re
from typing import Literal

NumericMode = Literal["rmae", "exact", "relative"]

_FRAC = re.compile(r"\\[dt]?frac\{([^{}]{1,30})\}\{([^{}]{1,30})\}")
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?"
)
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NAME = re.compile(rf"\b(?:{'|'.join(_NAMES)})\b", re.IGNORECASE)
_VALUES = {name: float(value) for value, name in enumerate(_NAMES)}

#: Tolerance of the "relative" mode, as a share of the truth.
RELATIVE_TOLERANCE = 1e-3


def parse_number(text: str) -> float | None:
    """The one number a text states, or None: none at all, several different ones, or not finite.

    Reads signs, thousands separators, exponents, fractions ("3/4", "\\frac{3}{4}"), units around it; "zero" to
    "twelve" where no digits stand.
    """
    plain = _FRAC.sub(r"\1/\2", text.replace("−", "-").replace("–", "-"))
    found = {_value(match.group()) for match in _NUMBER.finditer(plain)}
    if not found:
        found = {_VALUES[match.group().lower()] for match in _NAME.finditer(plain)}
    if len(found) != 1:  # several numbers are a hedge, not an answer
        return None
    (value,) = found
    return value


def _value(literal: str) -> float | None:
    above, _, below = literal.replace(",", "").partition("/")
    divisor = float(below) if below else 1.0
    if divisor == 0.0:
        return None
    value = float(above) / divisor
    return value if math.isfinite(value) else None


def numeric_score(predicted: float, truth: float, mode: NumericMode) -> float:
    """Score in [0, 1] of a number against the true one.

    ``rmae``: 1 - min(1, |y_hat - y| / |y|), denominator 1 when y = 0; ``exact``: equal after rounding to two decimals;
    ``relative``: within 1e-3 of |y| (of 1 when y = 0).
    """
    if mode == "exact":
        return float(round(predicted, 2) == round(truth, 2))
    scale = abs(truth) or 1.0
    error = abs(predicted - truth) / scale
    if mode == "relative":
        # One part in 1e12 of slack: a difference of exactly 1e-3 is not representable.
        return float(error <= RELATIVE_TOLERANCE * (1 + 1e-12))
    return 1.0 - min(1.0, error)
