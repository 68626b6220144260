"""Numbers read out of an answer, and compared with the truth (docs/method.md 1.5)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from avatar_rl.rewards.answers.chinese_numerals import chinese_number
from avatar_rl.rewards.answers.scales import ATTACHED, EAST_ASIAN, EXPONENTS, UNCLEAR, WORDS

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
#: No letter or digit before; Chinese, Japanese and Korean words stand right beside a number.
_APART = r"(?<![^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])(?<!\.)"
_NUMBER = re.compile(
    rf"{_APART}"
    r"([-+]?(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)|\d+|(?=\.\d))"
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
    r"|\b(?:minus|negative|not)\s+\0|[<>≤≥≦≧±∓]|\\(?:pm|mp|[lg]eq?|[lg]t|neq?)(?![a-z])|≠"
    r"|\b(?:at\s+(?:least|most)|(?:more|less|fewer|greater|higher|lower)\s+than|up\s+to)\s+\0"
    r"|\0\s*(?:or\s+(?:more|less|fewer)\b|\+(?!\d)|[多余餘几幾])|^\W*\0!\W*$|\0\s*times\s+(?:ten|\0)"
    r"|\0[\s-]+(?:half|halves|thirds?|and\s+a\s+(?:half|quarter))\b"
    rf"|\b(?:{'|'.join(_SCALES)})\b"
    # signs and factors in words, bounds
    r"|\b(?:neg|neg\.|twice|double|triple|half(?:\s+of)?|log|ln|over|under|below|above|beyond|exceeds?"
    r"|exceeding|no|without|except|isn't|wasn't|aren't|less|none\s+of(?:\s+the)?)\s+\0"
    r"|\0\s*(?:factorial\b|plus\b|or\s+so\b|(?:squared|cubed)(?!\s+[a-z])|-?fold\b"
    r"|(?:[a-z]+\s+){0,2}below\s+(?:zero|freezing))|-\s*\(\s*\0"
    r"|(?:至少|最少|不到|不足|超过|超過|多于|多於|少于|少於|大于|大於|小于|小於|低于|低於|高于|高於|最多|不是|非|以下|未满)\s*\0"
    r"|\0\s*[^\W\d_]{0,2}(?:以上|以下|以内|左右|来个|未満)"
    # 1m30s, 2h15: a second number glued to the first one's unit; m2 and cm3 are units
    r"|\0(?!(?:[kcdmµμ]?m|ft|in|yd|mi|px)[23](?![a-z\d]))[a-zµμ]{1,4}\d"
)

# -- numbers written with a scale: 3 \\times 10^8, 5{,}000, 5k, 3万 ---------------------------------

#: Minus signs: of mathematics, dashes, the hyphen that does not break, small and raised ones.
_MINUS = "\u2212\u2010\u2011\u2012\u2013\ufe63"
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(
    map(ord, _MINUS), "-"
)
_RAISED_MINUS = re.compile(r"(?<![\d}\u2070-\u2079])\u207b(?=\d)")
_ARABIC_POINT = re.compile(r"(?<=\d)\u066b(?=\d)|(?<!\d)\u066b(?=\d)")
_SUPERSCRIPTS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,;:! ]\s?|[_'’~])(?=\d{3}(?!\d))")
_INDIAN = re.compile(r"(?<![\w.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])")
#: Blanks of LaTeX count as blanks.
_GAP = r"(?:\s|\\[,;:! ]|~){0,8}"
_POWER_OF_TEN = (
    r"(?:10|\{10\})\s*(?:(?:\^|\*\*)\s*(?:\{\s*([-+]?\d{1,3})\s*\}|\(\s*([-+]?\d{1,3})\s*\)|([-+]?\d{1,3}))"
    r"|([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3}))(?!\d|\.\d)"
)
_SCIENTIFIC = re.compile(
    rf"(?<![\w.,/^])([-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+){_GAP}"
    rf"(?:\\times|\\cdot|times|[×·⋅∙⨯✕*xX]){_GAP}{_POWER_OF_TEN}"
)
_BARE_POWER = re.compile(rf"(?<![\w.,^])([-+]?){_POWER_OF_TEN}")


def _either(names: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, names), key=len, reverse=True))


_SUFFIX = (
    rf"((?:{_either(ATTACHED)})(?!\w)|\s?(?i:{_either(WORDS)})(?!\w)"
    rf"|\s?(?:{_either(EAST_ASIAN)})(?![\d〇一二三四五六七八九十百千万萬亿億만억조]))"
)
_SCALED = re.compile(rf"{_APART}(?<![/,^])([-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)){_SUFFIX}")
_MONEY = re.compile(r"([$€£]\s?\d[\d,]*(?:\.\d+)?)m(?!\w)")
#: What may stand behind metres; "1.5m people" are millions.
_OF_LENGTH = (
    r"(?:tall|long|high|wide|deep|thick|away|from|above|below|ahead|across|apart|into|over|under|back"
    r"|left|right|behind|north|south|east|west|beyond|before|after|towards?|square|cubed|sprint|dash"
    r"|race|down|forward|upwards?|onwards?|mark|height|width|depth|length|distance|radius|diameter)\b"
)
#: A scale that is left, or one that could be a unit as well: the digits alone would be a guess.
_UNCLEAR = re.compile(
    rf"(?<=\d)(?:{_SUFFIX}|\s?(?:{_either(EAST_ASIAN)})|[TG](?!\w)|\s[MBKkb](?!\w)|kk(?!\w)|十|廿|卅"
    rf"|\s?(?i:{_either(UNCLEAR)})(?!\w)|m(?=\s+(?!{_OF_LENGTH})[a-z]{{4}}))"
)
_UNREADABLE = "√"  # a formula: see _ALTERED


def _written_out(text: str) -> str:
    """``text`` with its powers of ten and scales as exponents ("3 × 10^8", "5k" -> "3e8", "5e3"),
    and a mark where a scale is ambiguous."""
    text = plain_signs(text)
    text = _SCIENTIFIC.sub(lambda match: f"{match[1]}e{_exponent(match, 2)}", text)
    text = _BARE_POWER.sub(lambda match: f"{match[1]}1e{_exponent(match, 2)}", text)
    text = _MONEY.sub(r"\1M", text)
    text = _SCALED.sub(lambda match: f"{match[1]}e{_scale_exponent(match[2])}", text)
    return _UNCLEAR.sub(_UNREADABLE, text)


def plain_signs(text: str) -> str:
    """``text`` with ASCII digits and signs, and with its thousands separated by commas or not at
    all."""
    text = _RAISED_MINUS.sub("-", _ARABIC_POINT.sub(".", text.translate(_FULL_WIDTH)))
    text = _THOUSANDS.sub(",", text)
    return _INDIAN.sub(lambda match: match[0].replace(",", ""), text)


def _exponent(match: re.Match[str], first: int) -> int:
    """Of the four groups that ``_POWER_OF_TEN`` begins at ``first``."""
    written = next(group for group in match.groups()[first - 1 :] if group is not None)
    return int(written.translate(_SUPERSCRIPTS))


def _scale_exponent(suffix: str) -> int:
    name = suffix.strip()
    return EXPONENTS.get(name) or EXPONENTS[name.lower()]


#: Tolerance of the "relative" mode, as a share of the truth.
RELATIVE_TOLERANCE = 1e-3


def parse_number(text: str) -> float | None:
    """The one number a text states, or None: none at all, several different ones, a formula, or not
    finite.

    Reads signs, thousands separators (also blanks, "5{,}000"), exponents, powers of ten
    ("3 \\times 10^8"), scales ("5k", "1.2M", "3万", "5 lakh", "5 million"), fractions ("3/4",
    "3\\frac{1}{2}"), units around it; "twenty-five", "one hundred", "十二" where no digits stand.
    "\\sqrt{2}", "4\\pi", "2^5", "1.000.000", "1m30s" are None, as is a scale that could be a
    unit ("5 M")."""
    plain = _FRAC.sub(_fraction, _written_out(text).lower())
    plain = _UNIT_POWER.sub(r"\1\2", plain)
    found = {_scaled(_value(match[1]), match[2]) for match in _NUMBER.finditer(plain)}
    rest = _NUMBER.sub("\0", plain)
    if not found:
        found = {_scaled(_named(match[1]), match[2]) for match in _NAME.finditer(plain)}
        rest = _NAME.sub("\0", plain)
    if not found and (counted := chinese_number(text)) is not None:
        return float(counted)
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
