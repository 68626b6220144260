"""Forms in which models and datasets write the same answer, and hedges that look like them."""

from __future__ import annotations

import unicodedata

import pytest

from avatar_rl.prompts.choices import choice_letter
from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.answers.accuracy import answer_score
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
        # signs, factors and bounds in words
        *("-(5)", "neg 5", "5 below zero", "5 degrees below zero", "twice 5", "half of 5"),
        *("5 squared", "5 factorial", "log 5", "5-fold", "over 5", "under 5", "isn't 5", "no 5"),
        *("5 or so", "5 plus", "至少5", "不到5", "超过5", "5以上", "5左右"),
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 \\times 10^8", 3e8),
        ("$3\\times10^{8}$", 3e8),
        ("3 × 10⁸", 3e8),
        ("3*10**8", 3e8),
        ("1.5 \\cdot 10^{-3} \\text{ m}", 0.0015),
        ("-10^{3}", -1000.0),
        ("10⁻³", 1e-3),
        ("10^3.", 1000.0),
        ("5{,}000{,}000", 5e6),
        ("5\\,000", 5000.0),
        ("1_000", 1000.0),
        ("5'000", 5000.0),
        ("1,00,000", 1e5),
        ("３．５", 3.5),
        ("5k", 5000.0),
        ("-5K people", -5000.0),
        ("1.2M", 1.2e6),
        ("$5m", 5e6),
        ("5m", 5.0),
        ("5m2", 5.0),
        ("1.5B", 1.5e9),
        ("$1.5bn", 1.5e9),
        ("5 mn", 5e6),
        ("5 lakh", 5e5),
        ("2.5 crore", 2.5e7),
        ("5 millones", 5e6),
        ("5 млн", 5e6),
        ("约3万", 3e4),
        ("2亿人", 2e8),
        ("100만", 1e6),
        ("有5只", 5.0),
        *((f"{sign}5", -5.0) for sign in "-−－﹣‐‑‒–⁻"),
        ("٥٫٥", 5.5),
        ("5 squared meters", 5.0),
    ],
)
def test_a_scale_belongs_to_its_number(text: str, number: float) -> None:
    assert parse_number(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        *("5 M", "5 B", "2.5T", "5 mil", "5 K people", "3/4M", "1e3k", "1.5 lakh crore"),
        *("5 k", "5kk", "5G", "5 grand", "5 bln", "5 tens", "5 pairs", "5十", "5 quadrillion"),
        *("5 per mille", "5‰"),
        *("3万5千", "1億2000万", "1m30s", "1h30", "10^2.5", "10^3^2", "2×3×10^2", "10月5日"),
    ],
)
def test_an_unclear_scale_never_leaves_the_bare_digits(text: str) -> None:
    assert parse_number(text) is None
    assert answer_score(ask(ProblemType.NUMERICAL, text), text) == 1.0
    assert answer_score(ask(ProblemType.NUMERICAL, text), text.strip("MBTKkil ")[:1]) < 1.0


@pytest.mark.parametrize(
    "answer",
    [
        *("Therefore, the answer is B.", "So the correct option is (B)", "Final answer: B"),
        *("**Final Answer**: (B) green ball", "The right answer is B", "My answer is B"),
        *(
            "It is B.",
            "The answer should be B",
            "Answer - B",
            "answer=B",
            "Choose B",
            "I choose (B).",
        ),
        *("the answer is option B: green ball", "The answer's B", "<B>", "{B}", "【B】"),
        *(
            "答案是B",
            "答案：B",
            "选B",
            "故选：B。",
            "正确答案是 B。",
            "因此，正确答案为B",
            "B项",
            "B是正确答案",
        ),
        *("正解はB", "正解はBです", "정답은 B입니다", "Ответ: B", "La respuesta es B"),
        *("La réponse est B", "Die Antwort ist B", "A resposta correta é B"),
    ],
)
def test_the_letter_counts_in_a_closing_sentence(answer: str) -> None:
    assert choice_letter(answer, OPTIONS) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "Therefore, the answer is A or B",
            "It is not B",
            "Final answer: A, B",
            "Choose A, not B",
        ),
        *("The answer is not B", "So the answer is A. B is wrong", "I choose both A and B"),
        *("It is a dog", "It is a", "the answer is Bob", "答案不是B", "不选B", "选A或B", "A、绿色"),
    ],
)
def test_a_sentence_that_hedges_names_no_letter(answer: str) -> None:
    assert choice_letter(answer, OPTIONS) is None


@pytest.mark.parametrize("mark", ["、", "．", "：", ") ", ". ", ": "])
def test_options_in_chinese_have_letters(mark: str) -> None:
    options = (f"A{mark}红色", f"B{mark}绿色")
    for answer in ("B", "绿色", f"B{mark}绿色"):
        assert choice_letter(answer, options) == "B"
    assert choice_letter(f"A{mark}绿色", options) is None


LABELLED = Prompt(
    id="p",
    question="q",
    answer="A, C",
    problem_type=ProblemType.MULTI_LABEL,
    options=("A. dog", "B. cat", "C. bird"),
)


@pytest.mark.parametrize(
    "answer",
    [
        *("A、C", "A，C", "A；C", "A & C", "A C", "ac", "(A)(C)", "A+C", "[A, C]", "答案是AC"),
        *("\\boxed{AC}", "$\\boxed{A, C}$", "Options A and C", "- A\n- C", "1. A\n2. C"),
        *("The correct options are A and C.", "A. dog, C. bird", "dog and bird"),
    ],
)
def test_several_letters_are_read_however_they_are_joined(answer: str) -> None:
    assert answer_score(LABELLED, answer) == 1.0


def test_a_hedge_between_letters_is_no_set_of_them() -> None:
    assert answer_score(LABELLED, "A or C") == 0.0
    words = LABELLED.model_copy(update={"options": ("cab", "dog", "bus"), "answer": "cab"})
    assert answer_score(words, "cab") == 1.0  # the word, not the letters C, A and B
    assert answer_score(words, "dog") == 0.0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        *(("dog, cat", a) for a in ("- dog\n- cat", "1. dog\n2. cat", "dog & cat", "• dog\n• cat")),
        *(("dog, cat", a) for a in ("dog + cat", "dog; cat", "the dog, the cat")),
        *(("狗,猫", a) for a in ("狗，猫", "狗、猫", "狗和猫", "狗与猫")),
        ("R&B, C++", "C++, R&B"),
    ],
)
def test_labels_are_read_however_they_are_joined(truth: str, answer: str) -> None:
    assert answer_score(ask(ProblemType.MULTI_LABEL, truth), answer) == 1.0


@pytest.mark.parametrize(
    ("truth", "read"),
    [
        ("สวัสดีครับ", "ส่วัสดีครับ"),
        ("ສະບາຍດີ", "ສະບາຍດ"),
        ("ជំរាបសួរ", "ជំរាបសួ"),
        ("မင်္ဂလာပါ", "မင်္ဂလာပ"),
        ("你好世界再见朋友", "你好世界再见朋有"),
    ],
)
def test_a_slip_in_a_script_without_spaces_costs_one_character(truth: str, read: str) -> None:
    assert 0.8 < answer_score(ask(ProblemType.OCR, truth), read) < 1.0


@pytest.mark.parametrize("sentence", ["हिन्दी भाषा है", "தமிழ் மொழி", "مَرْحَبًا بِكُم", "ສະບາຍດີ"])
def test_vowel_signs_belong_to_their_word(sentence: str) -> None:
    free = ask(ProblemType.FREE_FORM, sentence)
    assert answer_score(free, sentence) == 1.0
    bare = "".join(c for c in sentence if unicodedata.category(c)[0] != "M")
    assert answer_score(free, bare) < 1.0
