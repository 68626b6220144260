"""Answers as people and models write them in many languages: read, or refused, never half read."""

from __future__ import annotations

import pytest

from avatar_rl.prompts.choices import choice_letter
from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.answers.accuracy import answer_score
from avatar_rl.rewards.answers.numeric import parse_number
from avatar_rl.rewards.answers.text import ocr_score

OPTIONS = ("A. red ball", "B. green ball", "C. a T-shirt", "D. blue")


def ask(truth: str, kind: ProblemType, *options: str) -> Prompt:
    return Prompt(id="p", question="q", answer=truth, problem_type=kind, options=options)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("5 millió", 5e6), ("5 miljoner", 5e6), ("5 tusen", 5e3), ("5 duizend", 5e3)),
        *(("5jt", 5e6), ("5rb", 5e3), ("5 tys.", 5e3), ("5 тис.", 5e3), ("5 χιλ", 5e3)),
        *(("5 ألف", 5e3), ("٣ ملايين", 3e6), ("5 אלף", 5e3), ("5 হাজার", 5e3), ("5 লক্ষ", 5e5)),
        *(("5แสน", 5e5), ("5 ล้านคน", 5e6), ("5 ພັນ", 5e3), ("5 សែន", 5e5), ("2 миң", 2e3)),
        *(("6.02 \\times {10}^{23}", 6.02e23), ("4.5\\times\\,10^{9}", 4.5e9)),
        *(("4.5\\ \\times\\ 10^{9}", 4.5e9), ("4.5 times 10^9", 4.5e9), ("11,\\! 111", 11111.0)),
        *(("1.5m tall", 1.5), ("3 times", 3.0), ("5~000", 5000.0)),
    ],
)
def test_scales_of_other_languages_and_spellings(text: str, number: float) -> None:
    assert parse_number(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("十", 10), ("十二", 12), ("二十五", 25), ("一百零三", 103), ("一百一十", 110)),
        *(("一千零一十", 1010), ("两百", 200), ("三万五千", 35000), ("五百万零三", 5000003)),
        *(("一万亿", 10**12), ("二〇二四", 2024), ("负三", -3), ("答案是十二。", 12)),
        *(("一共有十二个", 12), ("兩萬", 20000)),
    ],
)
def test_chinese_numerals_are_numbers(text: str, number: int) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text", ["一百二", "百十", "一二个", "十二或十三", "第三", "不是三", "约十"]
)
def test_numerals_that_are_read_in_two_ways_state_no_number(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("answer", "letter"), [("②", "B"), ("2.", "B"), ("(3)", "C"), ("1번", "A"), ("4", None)]
)
def test_options_with_numbers_of_their_own_are_named_by_them(
    answer: str, letter: str | None
) -> None:
    assert choice_letter(answer, ("① red", "② green", "③ blue")) == letter
    assert choice_letter(answer, ("A. 1) red", "B. 2) green", "C. 3) blue")) == letter
    assert choice_letter(answer, OPTIONS) is None


@pytest.mark.parametrize(
    "text",
    [
        *("5 K", "300 K", "1.5m people", "5 bin", "5 biliun", "3십", "3万多", "0,111", "x < 5"),
        *("≥5", "not 5", "at least 5", "up to 5", "5 or more", "5!", "4.5 times ten", "3 ± 1"),
    ],
)
def test_what_states_no_plain_number_pays_no_bare_digits(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "answer",
    [
        *("Hence B", "Therefore B.", "∴ B", "=> B", "→ B", "#B", "Ans: B", "Solution: B"),
        *("I'd choose B", "I'll go with B", "Clearly, the answer is B.", "Correct: B", "So B"),
        *("Based on the video, the answer is B.", "After watching the clip, I think B"),
        *("The ball is green, so the answer is B.", "The most appropriate answer is B"),
        *("The answer is definitely B", "It's the green ball", "The answer is the green ball."),
        *("B because it is green", "B, since the ball is green", "B is correct because it shines"),
        *("故答案为：B", "本题选B", "正确的是B", "Cevap: B", "Odpowiedź: B", "Đáp án là B"),
        *("คำตอบคือ B", "Jawaban: B", "الإجابة: B", "उत्तर: B", "Antwoord: B", "Svaret är B"),
        *("<b>B</b>", "<p><strong>B. green ball</strong></p>", "B<br/>", "only B", "It's only B"),
        *("Відповідь: B", "Válasz: B", "Απάντηση: B", "התשובה היא B", "A resposta é B"),
    ],
)
def test_a_letter_in_the_closing_sentence_of_many_languages(answer: str) -> None:
    assert choice_letter(answer, OPTIONS) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        *("The incorrect answer is B", "The wrong option is B", "The least likely answer is B"),
        *("It is red, so the answer is not B", "I think A or B", "B because A is wrong, or C"),
        *("The answer is A. No wait, the answer is B", "I reject B", "Eliminate B"),
        *("选A不选B", "除了B", "B가 아닙니다", "la respuesta no es B", "Ответ не B"),
        *("The answer is the red ball or the green ball", "I believe A, but the answer is B"),
    ],
)
def test_what_takes_it_back_or_names_two_is_no_answer(answer: str) -> None:
    assert choice_letter(answer, OPTIONS) is None


LETTERED = ask("A, C", ProblemType.MULTI_LABEL, "A. dog", "B. cat", "C. bird")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        *((LETTERED, a) for a in ("A y C", "A et C", "A und C", "A и C", "A ve C", "A dan C")),
        *((LETTERED, a) for a in ("A và C", "A และ C", "A و C", "A और C", "A와 C", "A 및 C")),
        *((LETTERED, a) for a in ("both A and C", "A as well as C", "A and C are correct")),
        *((LETTERED, a) for a in ("$\\{A, C\\}$", "<A><C>", "A・C", "A → C", "①A ②C")),
        *(
            (ask("dog, cat", ProblemType.MULTI_LABEL), a)
            for a in ("✓ dog\n✓ cat", "a) dog\nb) cat", "(1) dog (2) cat", "① dog ② cat")
        ),
        *(
            (ask("dog, cat", ProblemType.MULTI_LABEL), a)
            for a in (
                "1、dog\n2、cat",
                "[1] dog\n[2] cat",
                "dog\tcat",
                "dog et cat",
                "dog plus cat",
            )
        ),
        *(
            (ask("狗,猫", ProblemType.MULTI_LABEL), a)
            for a in (
                "狗 猫",
                "1.狗 2.猫",
                "（1）狗（2）猫",
                "【狗】【猫】",
                "狗跟猫",
                "狗还有猫",
                "狗。猫",
            )
        ),
        *((ask("หมา, แมว", ProblemType.MULTI_LABEL), a) for a in ("หมาและแมว", "หมา แมว")),
        *((ask("كلب، قطة", ProblemType.MULTI_LABEL), a) for a in ("كلب وقطة", "كلب و قطة")),
    ],
)
def test_several_labels_in_the_ways_of_many_languages(prompt: Prompt, answer: str) -> None:
    assert answer_score(prompt, answer) == 1.0


def test_letters_that_are_words_elsewhere_stay_options() -> None:
    many = ask("A, E", ProblemType.MULTI_LABEL, *(f"{letter}. {letter * 3}" for letter in "ABCDE"))
    assert answer_score(many, "A, E") == answer_score(many, "AE") == 1.0
    assert answer_score(many, "A, C, E") == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("read", "truth"),
    [("don't walk", "don’t walk"), ("co\u00adop", "coop"), ("สวัสดีครับ", "สวัสดี\u200bครับ")],
)
def test_what_no_eye_can_tell_apart_is_no_slip(read: str, truth: str) -> None:
    assert ocr_score(read, truth) == 1.0
