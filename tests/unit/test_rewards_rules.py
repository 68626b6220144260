"""Format, answers of every problem type, voting, grounding and fusion: hand values and independent
libraries."""

from __future__ import annotations

import time

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avatar_rl.prompts.choices import choice_letter
from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.answers.accuracy import (
    SOLVED,
    accuracy_score,
    answer_score,
    canonical_answer,
)
from avatar_rl.rewards.answers.format import extract_answer, format_score, think_text, well_formed
from avatar_rl.rewards.answers.grounding import Segment, parse_grounded
from avatar_rl.rewards.answers.numeric import numeric_score, parse_number
from avatar_rl.rewards.answers.text import ocr_score, rouge_score
from avatar_rl.rewards.group_rewards import attention_score, self_consistency_scores
from avatar_rl.rewards.record import Completion

OPTIONS = ("A. red", "B. green", "C. a red ball")


def prompt(kind: ProblemType, answer: str, options: tuple[str, ...] = ()) -> Prompt:
    return Prompt(id="p", question="q", answer=answer, problem_type=kind, options=options)


def completion(text: str, logprob: float = -1.0, tokens: int = 10) -> Completion:
    return Completion(text=text, finished=True, mean_logprob=logprob, tokens=tokens)


def say(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" \n<think>a\nb</think>\n\n<answer> b </answer>\n", True),
        ("<think>a < b</think><answer>c > d</answer>", True),
        ("<think></think><answer>b</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think>so<answer>b</answer>", False),
        ("x<think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>x", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<think>a<think>b</think><answer>b</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("</think>a<think><answer>b</answer>", False),
        ("<think>a</think></answer>b<answer>", False),
        ("<think>a</think><answer>b", False),
        ("", False),
    ],
)
def test_format_is_the_whole_string(text: str, good: bool) -> None:
    assert well_formed(text) is good
    assert format_score(text, finished=True, scale="signed") == (1.0 if good else -1.0)
    assert format_score(text, finished=True, scale="binary") == (1.0 if good else 0.0)


@pytest.mark.parametrize(
    ("text", "opened", "closed"),  # by prompts that end with the opening tag, and by others
    [
        ("It is green.\n</think>\n<answer>B</answer>", True, False),
        ("<think>It is green.</think><answer>B</answer>", False, True),
        ("</think><answer>B</answer>", False, False),
        ("a</think>so<answer>B</answer>", False, False),
        ("a</think><answer>B</answer><answer>C</answer>", False, False),
        ("a</think>b</think><answer>B</answer>", False, False),
        ("a<answer>B</answer>", False, False),
        ("a</think><answer>B</answer>x", False, False),
        ("a</think><think><answer>B</answer>", False, False),
        ("", False, False),
    ],
)
def test_what_the_prompt_opened_belongs_to_the_format(
    text: str, opened: bool, closed: bool
) -> None:
    assert well_formed(text, True) is opened
    assert well_formed(text, False) is well_formed(text) is closed
    assert well_formed(text, None) is (opened or closed)  # nobody knows how the prompt ended
    for prefilled, good in ((True, opened), (False, closed), (None, opened or closed)):
        value = format_score(text, finished=True, scale="signed", prefilled=prefilled)
        assert value == (1.0 if good else -1.0)
        assert format_score(text, finished=False, scale="signed", prefilled=prefilled) == -1.0


SEEN = "<time>0.0-1.0</time><caption>x</caption>"


@pytest.mark.parametrize(
    ("text", "opened", "closed"),
    [
        (SEEN + "so</thinking><answer>B</answer>", True, False),
        (SEEN + "<thinking>so</thinking><answer>B</answer>", False, True),
        (SEEN + "</thinking><answer>B</answer>", False, False),
        ("so</thinking><answer>B</answer>", False, False),
        ("x" + SEEN + "so</thinking><answer>B</answer>", False, False),
        (SEEN + "so</thinking><answer>B</answer>x", False, False),
        (SEEN + "so<answer>B</answer>", False, False),
    ],
)
def test_what_the_prompt_opened_belongs_to_the_grounded_format(
    text: str, opened: bool, closed: bool
) -> None:
    assert parse_grounded(text, True).strict is opened
    assert parse_grounded(text, False).strict is parse_grounded(text).strict is closed
    assert parse_grounded(text, None).strict is (opened or closed)
    assert parse_grounded(text, True).segments == parse_grounded(text).segments


@pytest.mark.parametrize(
    "text", ["It is green.\n</think><answer>B</answer>", "It is green. </thinking> B"]
)
def test_reasoning_that_the_prompt_opened_is_read(text: str) -> None:
    assert think_text(text) == "It is green."


def test_truncated_completion_fails_the_format() -> None:
    assert format_score(say("B"), finished=False, scale="signed") == -1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (say(" B "), "B"),
        ("<answer>B</answer>", "B"),
        ("<think>the tag <answer>A</answer> is quoted</think><answer>B</answer>", "B"),
        ("<thinking>x</thinking><answer>B</answer>", "B"),
        ("<answer>A</answer><answer>B</answer>", None),
        ("<think>x</think><answer>B", None),
        ("</answer>B<answer>", None),
        (say("  "), None),
    ],
)
def test_answer_is_the_only_one_after_the_reasoning(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_think_text() -> None:
    assert think_text("<think> a </think><answer>b</answer>") == "a"
    assert think_text("<thinking>a</thinking><answer>b</answer>") == "a"
    assert think_text("a <answer>b</answer>") == "a"
    assert think_text("<think>cut off") == "cut off"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B. green", "B"),
        ("B) green", "B"),
        ("B green", "B"),
        ("Option B", "B"),
        ("The answer is B.", "B"),
        ("Answer: (b)", "B"),
        ("$\\boxed{B}$", "B"),
        ("green", "B"),
        ("Green.", "B"),
        ("A red ball", "C"),
        ("C. A red ball", "C"),
        ("B. because it is moving", "B"),
        ("A or B", None),
        ("A, B, C", None),
        ("A. B. C.", None),
        ("B. or A", None),
        ("B. red", None),
        ("D", None),
        ("blue", None),
        ("ABC", None),
        ("A big car", None),
        ("", None),
    ],
)
def test_choice_letter(answer: str, letter: str | None) -> None:
    assert choice_letter(answer, OPTIONS) == letter


def test_multiple_choice_truth_in_any_spelling() -> None:
    for truth in ("B", "b", "B. green", "green", "(B)"):
        assert answer_score(prompt(ProblemType.MULTIPLE_CHOICE, truth, OPTIONS), "B") == 1.0
        assert answer_score(prompt(ProblemType.MULTIPLE_CHOICE, truth, OPTIONS), "A") == 0.0
    digits = ("A. 3", "B. 4")
    assert answer_score(prompt(ProblemType.MULTIPLE_CHOICE, "B", digits), "4") == 1.0
    assert (
        answer_score(prompt(ProblemType.MULTIPLE_CHOICE, "yes"), "Yes.") == 1.0
    )  # no letter in the truth


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3.0),
        ("-2.5", -2.5),
        ("−2", -2.0),
        ("1,234.5", 1234.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("3/4", 0.75),
        ("\\frac{3}{4}", 0.75),
        ("$\\boxed{12}$", 12.0),
        ("about 12 beeps", 12.0),
        ("50%", 50.0),
        ("three", 3.0),
        ("3, so 3", 3.0),
        ("3 or 4", None),
        ("1-2", None),
        ("1/0", None),
        ("9" * 400, None),
        ("nan", None),
        ("", None),
    ],
)
def test_parse_number(text: str, number: float | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("given_", "truth", "rmae", "exact", "relative"),
    [
        (3.0, 3.0, 1.0, 1.0, 1.0),
        (2.0, 4.0, 0.5, 0.0, 0.0),
        (-4.0, 4.0, 0.0, 0.0, 0.0),
        (9.0, 4.0, 0.0, 0.0, 0.0),
        (-3.0, -4.0, 0.75, 0.0, 0.0),
        (0.0, 0.0, 1.0, 1.0, 1.0),  # y = 0: denominator 1
        (0.25, 0.0, 0.75, 0.0, 0.0),
        (5.0, 0.0, 0.0, 0.0, 0.0),
        (1.004, 1.0, 0.996, 1.0, 0.0),
        (1001.0, 1000.0, 0.999, 0.0, 1.0),
        (1002.0, 1000.0, 0.998, 0.0, 0.0),
    ],
)
def test_numeric_modes_by_hand(
    given_: float, truth: float, rmae: float, exact: float, relative: float
) -> None:
    assert numeric_score(given_, truth, "rmae") == pytest.approx(rmae, abs=1e-12)
    assert numeric_score(given_, truth, "exact") == exact
    assert numeric_score(given_, truth, "relative") == relative


def test_mode_is_for_numerical_only_regression_stays_rmae() -> None:
    assert answer_score(prompt(ProblemType.NUMERICAL, "4"), "2", "exact") == 0.0
    assert answer_score(prompt(ProblemType.REGRESSION, "4"), "2", "exact") == 0.5
    assert answer_score(prompt(ProblemType.NUMERICAL, "4"), "unknown") == 0.0


def test_ocr_equals_jiwer() -> None:
    for truth, answer in [
        ("the quick brown fox", "the quick brown fox"),
        ("the quick brown fox", "the quick red fox jumps"),
        ("stop here", "go"),
        ("exit 24 north", "exit north"),
        ("a b", "a b c d e f"),
    ]:
        assert ocr_score(answer, truth) == pytest.approx(
            1.0 - min(1.0, jiwer.wer(truth, answer)), abs=1e-12
        )
    assert ocr_score("STOP", "stop") == 1.0
    assert ocr_score("出口", "出口") == 1.0
    assert ocr_score("出门", "出口") == 0.5
    assert ocr_score("", "stop") == 0.0


WORDS = st.lists(
    st.sampled_from(["the", "a", "red", "blue", "car", "dog", "runs", "left"]), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(WORDS, WORDS.filter(lambda truth: len(truth) > 1))
def test_rouge_equals_google_rouge(answer: list[str], truth: list[str]) -> None:
    from rouge_score import rouge_scorer  # drags nltk in: a second for whoever collects this file

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = scorer.score(" ".join(truth), " ".join(answer))
    expected = sum(score.fmeasure for score in scores.values()) / 3
    assert rouge_score(" ".join(answer), " ".join(truth)) == pytest.approx(expected, abs=1e-12)


def test_rouge_of_one_word_and_other_scripts() -> None:
    assert rouge_score("Red.", "red") == 1.0
    assert rouge_score("red red", "red") == pytest.approx(2 / 3)
    assert rouge_score("рыжий кот", "рыжий кот") == 1.0
    assert rouge_score("!!", "!?") == 1.0 and rouge_score("x", "!?") == 0.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Left: cyclist / Center: girl", 1.0),
        ("center: a girl; LEFT: Cyclist.", 1.0),
        ("Left: cyclist\nMiddle: the girl", 1.0),
        ("Left: cyclist / Centre: boy", 0.5),
        ("Left: cyclist", 0.5),
        ("Left: cyclist / Left: girl / Center: girl", 0.5),
        ("Left: cyclist / Center: girl / Right: dog", 2 / 3),
        ("cyclist girl", 0.0),
    ],
)
def test_localisation_by_slot(answer: str, score: float) -> None:
    assert answer_score(
        prompt(ProblemType.LOCALISATION, "Left: cyclist / Center: girl"), answer
    ) == pytest.approx(score)


def test_localisation_without_slots() -> None:
    assert answer_score(prompt(ProblemType.LOCALISATION, "left"), "Left.") == 1.0


def test_multi_label_f1() -> None:
    plain = prompt(ProblemType.MULTI_LABEL, "dog, rain")
    assert answer_score(plain, "rain and dog") == 1.0
    assert answer_score(plain, "dog") == pytest.approx(2 / 3)
    assert answer_score(plain, "dog, rain, cat, cow") == pytest.approx(2 / 3)
    lettered = prompt(ProblemType.MULTI_LABEL, "A, C", OPTIONS)
    assert answer_score(lettered, "AC") == answer_score(lettered, "red; C. a red ball") == 1.0
    assert answer_score(lettered, "B") == 0.0


def test_accuracy_needs_an_answer_block_of_bounded_length() -> None:
    ask = prompt(ProblemType.FREE_FORM, "a red car")
    assert accuracy_score(ask, say("a red car"), numeric="rmae", max_answer_chars=64) >= SOLVED
    assert accuracy_score(ask, "a red car", numeric="rmae", max_answer_chars=64) == 0.0
    assert accuracy_score(ask, say("a red car " * 10), numeric="rmae", max_answer_chars=64) == 0.0


def vote(kind: ProblemType, truth: str, *completions: Completion) -> list[float]:
    return self_consistency_scores(prompt(kind, truth), completions, max_answer_chars=4096)


def test_majority_after_normalisation() -> None:
    texts = (say("3"), say("3.0"), say("three"), say("4"), "no answer", say("3 or 4"))
    assert vote(ProblemType.NUMERICAL, "4", *map(completion, texts)) == [
        1.0,
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
    ]


def test_tie_goes_to_the_higher_logprob_per_token() -> None:
    # 3: (-1.0*10 - 0.2*30) / 40 = -0.4;  4: (-0.45*10 - 0.45*10) / 20 = -0.45, above 3's plain mean
    # of -0.6
    group = (
        completion(say("3"), -1.0, 10),
        completion(say("4"), -0.45),
        completion(say("3"), -0.2, 30),
        completion(say("4"), -0.45),
    )
    assert vote(ProblemType.NUMERICAL, "9", *group) == [1.0, 0.0, 1.0, 0.0]


def test_nobody_answers() -> None:
    assert vote(ProblemType.NUMERICAL, "9", completion(""), completion("x")) == [0.0, 0.0]


def test_hedges_do_not_vote() -> None:
    ask = prompt(ProblemType.MULTIPLE_CHOICE, "B", OPTIONS)
    assert canonical_answer(ask, "A or B") is None
    assert canonical_answer(ask, "green") == "B"
    assert canonical_answer(prompt(ProblemType.NUMERICAL, "0"), "-0") == 0.0


GOOD = (
    "<time>0.0-1.5</time><caption>a dog barks</caption>\n<time>2.0-3.5</time><caption>it "
    "runs</caption>"
)
TAIL = "<thinking>so</thinking><answer>B</answer>"


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (f"{GOOD}{TAIL}", True, True),
        (f" {GOOD}\n<thinking>so</thinking>\n<answer>B</answer> ", True, True),
        (f"intro {GOOD}{TAIL}", False, True),
        (f"{GOOD} and {TAIL}", False, True),
        (f"{GOOD}{TAIL} end", False, True),
        (f"{GOOD}", False, False),
        (TAIL, False, False),
        (f"<time>2.0-1.0</time><caption>x</caption>{TAIL}", False, True),
        (f"<time>0-1</time><caption>x</caption>{TAIL}", False, True),
        (f"<time>0.0-1.0</time><caption> </caption>{TAIL}", False, True),
        (
            f"<time>1.0-2.0</time><caption>x</caption><time>0.0-0.5</time><caption>y</caption>{TAIL}",
            False,
            True,
        ),
        (
            f"<time>0.0-2.0</time><caption>x</caption><time>1.0-3.0</time><caption>y</caption>{TAIL}",
            False,
            True,
        ),
        (
            "".join(f"<time>{i}.0-{i}.5</time><caption>x</caption>" for i in range(8)) + TAIL,
            True,
            True,
        ),
        (
            "".join(f"<time>{i}.0-{i}.5</time><caption>x</caption>" for i in range(9)) + TAIL,
            False,
            True,
        ),
        ("", False, False),
    ],
)
def test_grounded_output(text: str, strict: bool, lenient: bool) -> None:
    output = parse_grounded(text)
    assert (output.strict, output.lenient) == (strict, lenient)


def test_grounded_segments_keep_the_unreadable_ones() -> None:
    output = parse_grounded(
        f"<time>soon</time><caption>x</caption><time>1.0-2.5</time><caption> y </caption>{TAIL}"
    )
    assert output.segments == (None, Segment(1.0, 2.5, "y"))


@pytest.mark.parametrize(
    ("both", "video", "audio", "lax", "strict"),
    [
        (1, 1, 0, 0.3, 0),
        (1, 0.5, 0.5, 0.3, 0.3),
        (0, 0, 0, 0.3, 0),
        (0.5, 1, 0, 0, 0),
        (0.5, 0, 1, 0, 0),
    ],
)
def test_fusion_bonus(both: float, video: float, audio: float, lax: float, strict: float) -> None:
    assert attention_score(both, video, audio, strict=False) == lax
    assert attention_score(both, video, audio, strict=True) == strict


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(list(ProblemType)),
    st.text(min_size=1, max_size=40).filter(str.strip),
    st.text(max_size=60),
    st.sampled_from(["rmae", "exact", "relative"]),
)
def test_scores_stay_in_range(kind: ProblemType, truth: str, answer: str, mode: str) -> None:
    ask = prompt(kind, truth, OPTIONS if kind is ProblemType.MULTI_LABEL else ())
    assert 0.0 <= answer_score(ask, answer, mode) <= 1.0  # type: ignore[arg-type]
    assert hash(canonical_answer(ask, answer)) is not None
    parse_grounded(f"<time>{answer}</time><caption>{truth}</caption>{answer}")


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 15_000,
        "<answer>" * 12_500,
        "<think>" + " " * 100_000,
        "(" * 100_000,
        "<time>" * 16_000,
        "<time>1.0-2.0</time><caption>x</caption>" * 2_500,
        "1," * 50_000,
        "111," * 25_000 + "1111",
        "9" * 100_000,
        "\\frac{" * 16_000,
        "Left: / " * 12_500,
        "the answer is " * 7_000,
        "\U0001f3b5\u0301" * 50_000,
    ],
    ids=range(13),
)
def test_hostile_text_of_100_kb_costs_no_time(text: str) -> None:
    started = time.perf_counter()
    for kind in ProblemType:
        ask = prompt(kind, "3", OPTIONS)
        for whole in (text, say(text), say(text[:4_000])):
            accuracy_score(ask, whole, numeric="rmae", max_answer_chars=4_096)
            self_consistency_scores(ask, [completion(whole)], max_answer_chars=4_096)
            well_formed(whole)
            parse_grounded(whole)
    assert time.perf_counter() - started < 3.0
