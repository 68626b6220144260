"""Whole numbers in Chinese characters: 十二, 一百零三, 二〇二四, 负三."""

from __future__ import annotations

import re

_DIGITS = {name: value for value, name in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_ONE = "([一二两三四五六七八九])"
_TRADITIONAL = str.maketrans("兩萬億負個隻張輛條", "两万亿负个只张辆条")
#: A number alone, with what may stand around it: "答案是十二。", "一共有十二个".
_STATED = re.compile(
    r"\W*(?:(?:答案|结果)(?:是|为)?|(?:一共|总共|共)(?:有|是)?|有)?[\s:]*"
    r"(负)?([零〇一二两三四五六七八九十百千万亿]+?)"
    r"\s*[个只人次秒分天岁年月日张辆条本名位]?\W*"
)
_BELOW_10000 = re.compile(
    rf"(?:{_ONE}千)?(?:[零〇]?{_ONE}百)?(?:[零〇]?{_ONE}?(十))?(?:[零〇]?{_ONE})?"
)
#: 一百二 is 120 to those who say it, and 102 to those who read it.
_TWO_WAYS = re.compile(r"[百千万亿][一二两三四五六七八九]$")


def chinese_number(text: str) -> int | None:
    """The number that ``text`` states; None: none, several, or one that is read in two ways."""
    match = _STATED.fullmatch(text.translate(_TRADITIONAL))
    if match is None or _TWO_WAYS.search(match[2]):
        return None
    if all(sign in _DIGITS for sign in match[2]):
        if 1 < len(match[2]) < 4 and not set(match[2]) & {"零", "〇"}:
            return None  # 三四 are three or four; a year or a code is longer
        value: int | None = int("".join(str(_DIGITS[sign]) for sign in match[2]))
    else:
        value = _value(match[2])
    return -value if value is not None and match[1] else value


def _value(written: str) -> int | None:
    for sign, size in (("亿", 10**8), ("万", 10**4)):
        above, found, below = written.rpartition(sign)
        if found:
            many, rest = _value(above), _value(below.lstrip("零〇")) if below else 0
            if not many or rest is None or rest >= size:
                return None
            return many * size + rest
    match = _BELOW_10000.fullmatch(written)
    if match is None or not written:
        return None
    thousands, hundreds, tens, ten, ones = match.groups()
    if ten and not tens and written[0] != "十":  # 百十 is no number; 十二 is
        return None
    value = sum(
        _DIGITS[digit] * size
        for digit, size in ((thousands, 1000), (hundreds, 100), (tens, 10), (ones, 1))
        if digit
    )
    return value + (10 if ten and not tens else 0)
