"""Formulas as answers, read by math-verify in a process of its own."""

from __future__ import annotations

import math
import time

import pytest

from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.answers import formula
from avatar_rl.rewards.answers.accuracy import answer_score, canonical_answer
from avatar_rl.rewards.answers.formula import FormulaReader, stated_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("2^5", 32), ("2**5", 32), ("2³", 8), ("(-2)^2", 4), ("-2^2", -4), ("x=2^{10}", 1024)),
        *(("√2", math.sqrt(2)), ("-\\sqrt{2}", -math.sqrt(2)), ("−√2", -math.sqrt(2))),
        *(("½", 0.5), ("3½", 3.5), ("2 1/2", 2.5), ("-2 1/2", -2.5), ("\\dfrac12", 0.5)),
        *(("4\\pi", 4 * math.pi), ("2π", 2 * math.pi), ("\\sqrt[3]{27}", 3), ("(9+1)", 10)),
        *(("so x = 3 or \\boxed{\\frac{14}{3}}", 14 / 3), ("2^5 \\text{ cm}", 32)),
        *(("minus 3", -3), ("negative three", -3), ("$\\frac{1{,}000}{3}$", 1000 / 3)),
    ],
)
def test_the_value_of_a_formula(text: str, number: float) -> None:
    assert stated_number(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        *("2^5 or 3", "\\sqrt{-1}", "1/0", "3 \\pm 1", "\\{1,2\\}", "1,2", "2^x", "12 13", "5-6"),
        *("2020-05-01", "10/4/2", "\\boxed{3}\\boxed{4}", "\\sin 30^\\circ", "0.1\\overline{6}"),
    ],
)
def test_what_states_no_single_number(text: str) -> None:
    assert stated_number(text) is None


def test_an_expression_without_end_costs_two_seconds_and_no_more() -> None:
    reader = FormulaReader()
    assert reader.value("1+1") == 2
    begun = time.monotonic()
    assert reader.value("9^{9^{9^{9}}}") is None
    assert time.monotonic() - begun < formula.ANSWER_S + 3
    assert reader.value("2^3") == 8  # by a new process


def test_a_formula_is_worth_its_value() -> None:
    ask = Prompt(id="p", question="q", answer="4\\pi", problem_type=ProblemType.NUMERICAL)
    assert answer_score(ask, "$4\\pi$", "exact") == answer_score(ask, "12.566", "exact") == 1.0
    assert answer_score(ask, "4", "exact") == answer_score(ask, "-4\\pi", "exact") == 0.0
    assert canonical_answer(ask, "12.57") == canonical_answer(ask, "4\\pi")
