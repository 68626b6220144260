"""The answer in a completion, and how right it is, by the rules that the benchmarks share.

An answer tag is looked at first, since the models that are trained here write one; without it what
follows the reasoning is. A completion that gives no answer is wrong: where authors draw a letter at
random instead, the set says so (``BenchmarkSet.deviation``)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from avatar_rl.cluster.benchmarks.record import Marked, Question
from avatar_rl.common.text import normalise
from avatar_rl.prompts.choices import choice_letter, split_option
from avatar_rl.rewards.answers.numeric import parse_number

#: Relative errors within which an estimate is right, of VSI-Bench (arXiv 2412.14171, 3.2) and the
#: regression questions of IntentBench: the mean over them is the mean relative accuracy.
TOLERANCES = tuple(Fraction(10 - step, 20) for step in range(10))  # 0.50, 0.45, ... 0.05

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_THINK_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SENTENCE = re.compile(
    r"(?:(?:final|correct|best)\s+)?(?:answer|option|choice)\s*(?:is|:|：)+\s*"
    r"[\s*_$\"'`(\[]*(?:option\s+)?\(?([A-Z])\b(?!\w)",
    re.IGNORECASE,
)
#: A capital that stands alone, but for the article and the person: "A cat", "I think".
_LETTER = re.compile(
    r"(?<![A-Za-z'’])\(?(?!A\s+(?!or\b|and\b|is\b)[a-z]|I\s+[a-z])([A-Z])(?![A-Za-z'’])"
)
_LETTERS = re.compile(r"\s*[A-Z](?:\s*(?:,|;|and|&|\s)\s*[A-Z])*\s*[.)]?\s*")
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def final_part(completion: str) -> str:
    """What the completion gives for its answer: the last answer tag's content, or what follows the
    reasoning, or all of it."""
    after = completion[max((m.end() for m in _THINK_END.finditer(completion)), default=0) :]
    if tags := _ANSWER.findall(after) or _ANSWER.findall(completion):
        return str(tags[-1]).strip()
    return after.strip() or completion.strip()


def letter_in(text: str, options: Sequence[str]) -> str | None:
    """The option that ``text`` chooses, as a capital; None where it chooses none.

    A plain answer first ("B", "(b) red", "Therefore, the answer is B", an option's words), then
    \\boxed, then the last "answer is X", then the only option's letter or words in the text."""
    known = [split_option(option)[0] for option in options]
    if plain := choice_letter(text, options):
        return plain
    if boxed := _BOXED.findall(text):
        return letter_in(boxed[-1], options) if boxed[-1] != text else None
    said = [letter.upper() for letter in _SENTENCE.findall(text)]
    if said and (not known or said[-1] in known):
        return str(said[-1])
    found = {letter for letter in _LETTER.findall(text) if not known or letter in known}
    if len(found) == 1:
        return str(found.pop())
    words = normalise(text)
    named = [letter for letter, option in map(split_option, options) if _names(words, option)]
    return named[0] if len(named) == 1 else None


def _names(words: str, option: str) -> bool:
    text = normalise(option)
    return len(text) > 1 and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", words) is not None


def mark(question: Question, completion: str, *, tokens: int = 0) -> Marked:
    """The completion's answer to ``question``, marked by its kind."""
    text = final_part(completion)
    given, score = _MARKS[question.kind](question, text)
    return Marked(question, given, score, tokens)


def gold_fault(question: Question) -> str | None:
    """Why no completion can be marked right, by the kind of the question; None where one can."""
    answer, kind = question.answer, question.kind
    if kind in ("choice", "choices"):
        letters = [split_option(option)[0] for option in question.options]
        if not set(answer.split(",") if kind == "choices" else [answer]) <= set(letters):
            return f"the gold answer {answer!r} is none of the options {list(question.options)}"
    elif kind in ("count", "relative") and not _is_number(answer):
        return f"the gold answer {answer!r} is no number"
    elif kind == "yes_no" and answer.lower() not in ("yes", "no"):
        return f"the gold answer {answer!r} is neither yes nor no"
    if mark(question, f"<answer>{answer}</answer>").score < 1:
        places = "" if question.decimals is None else f", after rounding to {question.decimals}"
        return f"the gold answer {answer!r} itself would be marked wrong (as {kind}{places})"
    return None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


_Found = tuple[str | None, float]


def _choice(question: Question, text: str) -> _Found:
    given = letter_in(text, question.options)
    return given, float(given == question.answer)


def _choices(question: Question, text: str) -> _Found:
    """F1 of the chosen letters."""
    truth = set(question.answer.split(","))
    if _LETTERS.fullmatch(text):
        given = set(_LETTER.findall(text))
    else:
        found = letter_in(text, question.options)
        given = {found} if found else set()
    hits = len(given & truth)
    return ",".join(sorted(given)) or None, 2 * hits / (len(given) + len(truth)) if hits else 0.0


def _yes_no(question: Question, text: str) -> _Found:
    said = [word.lower() for word in _YES_NO.findall(text)]
    given = said[0] if said and len(set(said)) == 1 else None
    return given, float(given == question.answer.lower())


def number_in(text: str) -> float | None:
    """The number that an answer gives; None where there is none, or where it gives several."""
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    return parse_number(text)


def _count(question: Question, text: str) -> _Found:
    """As CG-AV-Counting marks it (arXiv 2506.05328): no answer is taken for 0."""
    number = number_in(text)
    return _shown(number), float(abs((number or 0.0) - float(question.answer)) <= 1e-5)


def _relative(question: Question, text: str) -> _Found:
    number = number_in(text)
    return _shown(number), relative_accuracy(number, float(question.answer))


def relative_accuracy(number: float | None, truth: float) -> float:
    """Mean relative accuracy (VSI-Bench, arXiv 2412.14171, 3.2): the share of ``TOLERANCES`` that
    the relative error is within. 0 without a number; of a truth of 0, 1 for 0 alone."""
    if number is None or not math.isfinite(number):
        return 0.0
    if truth == 0:
        return float(number == 0)
    error = abs(number - truth) / abs(truth)
    return sum(error <= float(limit) + 1e-12 for limit in TOLERANCES) / len(TOLERANCES)


def _number(question: Question, text: str) -> _Found:
    number, truth = number_in(text), parse_number(question.answer)
    if number is None or truth is None:
        return _text(question, text)
    if question.decimals is not None:
        return _shown(number), float(round(number, question.decimals) == truth)
    return _shown(number), float(math.isclose(number, truth, rel_tol=1e-6, abs_tol=1e-9))


def _text(question: Question, text: str) -> _Found:
    boxed = _BOXED.findall(text)
    given = normalise(boxed[-1] if boxed else text)
    return given or None, float(given != "" and given == normalise(question.answer))


def _shown(number: float | None) -> str | None:
    return None if number is None else f"{number:g}"


_MARKS = {
    "choice": _choice,
    "choices": _choices,
    "yes_no": _yes_no,
    "count": _count,
    "relative": _relative,
    "number": _number,
    "text": _text,
}
