"""The value of a formula as an answer: "2^5", "\\frac{\\pi}{2}", "3\\sqrt{2}" (docs/method.md 1.5).

math-verify reads LaTeX. What it may see is decided here, because it drops what it does not know
("2³" and "2**5" become 2, "3½" becomes 3). It works in a process of its own that is killed after
``ANSWER_S``: one expression must not hold a reward actor up."""

from __future__ import annotations

import json
import logging
import re
import select
import subprocess
import sys
import threading
from functools import lru_cache

from avatar_rl.rewards.answers.numeric import parse_number, plain_signs

log = logging.getLogger(__name__)

ANSWER_S = 2.0
START_S = 60.0  # imports, on a busy machine
MOST_CHARS = 200

_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_MINUS = re.compile(r"(?i)\W*(?:minus|negative)\s+(?=\S)")
_UNIT = re.compile(r"(?:\\[,;:! ]|~|\s)*\\(?:text|mathrm|mbox|rm)\s*\{[^{}]*\}\s*$")
_NAME = re.compile(r"^[a-zA-Z]\s*=(?!=)")
_WRAPPED = re.compile(r"^(?:\$\$?|\\[(\[])(.*?)(?:\$\$?|\\[)\]])\.?$", re.DOTALL)
_MIXED = re.compile(r"(?<![\d.])(\d{1,6})\s+(\d{1,6}/\d{1,6})(?!\d)")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?))|(?<![\\a-z])sqrt\s*\(([^()]*)\)")
_SUPERSCRIPT = re.compile(r"[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_DIGITS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_VULGAR_SIGN = re.compile(rf"(\d*)\s*([{''.join(_VULGAR)}])")
#: All that math-verify may see. No letters, no functions, no list of numbers.
_KNOWN = re.compile(
    r"(?:[-+*/^(){}.\s\d]|\\(?:[dtc]?frac|sqrt|pi|cdot|times|div|left|right|binom)(?![a-zA-Z])"
    r"|\\sqrt\[\d{1,2}\]|\\[,;:! ])+"
)
_OPERATOR = re.compile(r"[-+*/^\\]")
#: Ranges, dates and lists.
_NO_FORMULA = re.compile(
    r"\d\s+[\d.]|[\d)]\s*\.\s*\.|^[\d.]+(?:\s*-\s*[\d.]+)+$|^\d+(?:\s*/\s*\d+){2,}$"
)


def stated_number(text: str) -> float | None:
    """The one number that ``text`` states, plainly, in its only box or as a formula; None: none.

    "minus three" is -3. A text of several numbers states none."""
    value = parse_number(text)
    if value is not None:
        return value
    if minus := _MINUS.match(text):
        value = stated_number(text[minus.end() :])
        return None if value is None else -value
    boxes = {content.strip() for content in _BOX.findall(text)}
    if boxes:
        inside = boxes.pop()
        return None if boxes or not inside else stated_number(inside)
    latex = _latex(text)
    return None if latex is None else _formula_value(latex)


def _latex(text: str) -> str | None:
    """``text`` as LaTeX that math-verify reads as it is meant; None where that is not sure."""
    if len(text) > MOST_CHARS:
        return None
    plain = plain_signs(text).strip()
    if wrapped := _WRAPPED.match(plain):
        plain = wrapped[1].strip()
    plain = _NAME.sub("", _UNIT.sub("", plain)).strip().rstrip(".")
    plain = _VULGAR_SIGN.sub(lambda match: _sum(match[1], _VULGAR[match[2]]), plain)
    plain = _MIXED.sub(lambda match: _sum(match[1], match[2]), plain)
    plain = _ROOT.sub(lambda match: rf"\sqrt{{{next(g for g in match.groups() if g)}}}", plain)
    plain = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_DIGITS)}}}", plain)
    plain = plain.replace("**", "^").replace("π", r"\pi ").replace("·", r"\cdot ")
    plain = plain.replace("×", r"\times ").replace("÷", "/").replace("⋅", r"\cdot ")
    plain = re.sub(r"\\[,;:! ]|~", " ", plain)
    if not (_KNOWN.fullmatch(plain) and _OPERATOR.search(plain)) or _NO_FORMULA.search(plain):
        return None
    return plain


def _sum(whole: str, fraction: str) -> str:
    return f"({whole}+{fraction})" if whole else f"({fraction})"


@lru_cache(maxsize=4096)
def _formula_value(latex: str) -> float | None:
    return _READER.value(latex)


class FormulaReader:
    """Asks a process that is started with the first formula and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def value(self, latex: str) -> float | None:
        """What formula_reader says; None also where it takes longer than ``ANSWER_S``."""
        with self._lock:
            try:
                process = self._process or self._start()
                assert process.stdin is not None
                process.stdin.write(json.dumps(latex).encode() + b"\n")
                process.stdin.flush()
                found: float | None = json.loads(self._line(process, ANSWER_S))
                return found
            except (OSError, TimeoutError, ValueError) as error:
                log.warning("the formula %.60r was given up (%s)", latex, error)
                self._end()
                return None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "avatar_rl.rewards.answers.formula_reader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._line(self._process, START_S)
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], timeout: float) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            raise TimeoutError(f"no value within {timeout:g} s")
        return process.stdout.readline()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_READER = FormulaReader()
