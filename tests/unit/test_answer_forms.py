"""Forms in which models and datasets write the same answer, and hedges that look like them."""

from __future__ import annotations

import pytest

from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.answers.accuracy import answer_score
from avatar_rl.rewards.answers.choice import choice_letter
from avatar_rl.rewards.answers.numeric import parse_number

OPTIONS = ("A. red ball", "B. green ball", "C. a T-shirt")


def ask(kind: ProblemType, truth: str) -> Prompt:
    return Prompt(id="p", question="q", answer=truth, problem_type=kind)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3\\frac{1}{2}", 3.5),
        ("-3 \\dfrac{1}{2}", -3.5),
        ("-\\frac{3}{4}", -0.75),
        ("x = \\frac{3}{4}", 0.75),
        ("45^\\circ", 45.0),
        ("90^o", 90.0),
        ("90^{o}", 90.0),
        ("5^{°}", 5.0),
        ("the 5^{th}", 5.0),
        ("5 m^2", 5.0),
        ("5 \\text{ cm}^{2}", 5.0),
        ("9.8 m/s^2", 9.8),
        ("1 000", 1000.0),
        ("12\u202f345\u2009678.5", 12345678.5),
        ("twenty-five", 25.0),
        ("Twenty five dogs", 25.0),
        ("one hundred", 100.0),
        ("three hundred and twenty-one", 321.0),
        ("nineteen", 19.0),
        ("five thousand", 5000.0),
        ("1.5 million people", 1.5e6),
        ("**5**", 5.0),
        ("60 km/h", 60.0),
        ("5 pixels", 5.0),
    ],
)
def test_a_number_is_read_whole(text: str, number: float) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *(
            "\\sqrt{2}",
            "√3",
            "sqrt(2)",
            "4\\pi",
            "π/4",
            "4 pi",
            "\\frac{\\pi}{4}",
            "\\frac{\\sqrt{3}}{2}",
        ),
        *(
            "\\frac12",
            "\\frac{5}{x}",
            "x\\frac{1}{2}",
            "1.3\\frac{1}{2}",
            "3½",
            "5²",
            "2^{10}",
            "x^2",
            "x/3",
        ),
        *("1.000.000", "1.2.1", "10:10", "3 + 3", "3x3", "2 \\times 2", "5.5.5"),
        *("two and a half", "two thirds", "minus five", "a hundred and five", "five point five"),
        *("nine hundred thousand", "5e400 million", "1e308 million"),
        *("fıve", "ſix", "nİne"),
    ],
)
def test_what_is_no_plain_number_is_not_read_as_part_of_it(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "1 2",
        "5 or 2",
        "0 123",
        "1 2345",
        "1 000 or 2 000",
        "5 m^2 or 6 m^2",
        "one two",
        "one hundred, two",
        "20, 25",
    ],
)
def test_several_numbers_stay_a_hedge(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize("kind", [ProblemType.NUMERICAL, ProblemType.REGRESSION])
def test_a_formula_as_truth_wants_the_formula(kind: ProblemType) -> None:
    assert answer_score(ask(kind, "4\\pi"), "$4\\pi$") == 1.0
    assert answer_score(ask(kind, "4\\pi"), "4") == 0.0
    assert answer_score(ask(kind, "\\sqrt{2}"), "2") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        *("B - green ball", "B – green ball", "B — the green ball", "B-green ball"),
        *(
            "The correct answer is option B",
            "The answer is the option B.",
            "The correct answer is: **B**",
        ),
        *("B is correct", "**B** is the correct answer.", "Option B is right"),
        *(
            "\\(B\\)",
            "\\[B\\]",
            "\\(\\text{B}\\)",
            "$\\boxed{\\text{B}}$",
            "The answer is $\\boxed{B}$",
        ),
        *("\\boxed{\\text{B. green ball}}", "\\mathbf{B}"),
        *("Ｂ", "（Ｂ）", "Ｂ．green ball"),
    ],
)
def test_the_letter_counts_in_every_usual_dress(answer: str) -> None:
    assert choice_letter(answer, OPTIONS) == "B"


def test_full_width_options_have_letters() -> None:
    assert choice_letter("B green ball", ("Ａ．red ball", "Ｂ．green ball")) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "A - B",
            "A – B",
            "A-B",
            "A - b",
            "B - red ball",
            "A - red ball, B - green ball",
            "A. B - green ball",
        ),
        *("option A option B", "The answer is option A or option B", "The answer is option A, B"),
        *("A is wrong, B is correct", "A is correct, B is correct", "A is correct. B is correct"),
        *("B is incorrect", "B is not correct", "A is B"),
        *("\\(A\\) or \\(B\\)", "\\(A\\) \\(B\\)", "\\(A\\). \\(B\\)", "$A$. $B$", "**A.** **B**"),
        *(
            "\\boxed{A}. \\boxed{B}",
            "$\\boxed{\\text{A}}$, $\\boxed{\\text{B}}$",
            "The answer is $A$. $B$",
        ),
        *("Ａ　Ｂ", "Ａ、Ｂ", "A-level", "A - because it moves"),
    ],
)
def test_several_letters_stay_a_hedge_in_any_dress(answer: str) -> None:
    assert choice_letter(answer, OPTIONS) is None


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("- Left: cyclist\n- Center: girl", 1.0),
        ("* Left: cyclist\n* Center: girl", 1.0),
        ("– Left: cyclist\n– Center: girl", 1.0),
        ("1. Left: cyclist\n2. Center: girl", 1.0),
        ("(1) **Left**: cyclist\n(2) **Center**: girl", 1.0),
        ("Left：cyclist／Center：girl", 1.0),
        ("- Left: cyclist\n- Left: girl\n- Center: girl", 0.5),
        ("1. Left: cyclist / 2. Left: girl / Center: girl", 0.5),
        ("Left: cyclist\n- Left: dog\n1. Center: girl\n- Right: dog", 1 / 3),
    ],
)
def test_lists_name_the_same_slots(answer: str, score: float) -> None:
    assert answer_score(
        ask(ProblemType.LOCALISATION, "Left: cyclist / Center: girl"), answer
    ) == pytest.approx(score)


def test_numbers_and_signs_can_be_slots() -> None:
    for truth in ("1: cyclist / 2: girl", "-30°: cyclist / 30°: girl"):
        assert answer_score(ask(ProblemType.LOCALISATION, truth), truth) == 1.0
    assert (
        answer_score(
            ask(ProblemType.LOCALISATION, "-30°: cyclist / 30°: girl"), "30°: cyclist / -30°: girl"
        )
        == 0.0
    )
