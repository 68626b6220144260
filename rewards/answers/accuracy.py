"""How right an extracted answer is, by problem type, and its normal form for voting (docs/method.md
1.5)."""

from __future__ import annotations

from collections.abc import Hashable

from avatar_rl.prompts.choices import choice_letter
from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.answers.format import extract_answer
from avatar_rl.rewards.answers.formula import stated_number
from avatar_rl.rewards.answers.labels import multi_label_score, parse_labels
from avatar_rl.rewards.answers.localisation import localisation_score, parse_slots
from avatar_rl.rewards.answers.numeric import NumericMode, numeric_score
from avatar_rl.rewards.answers.text import normalise, ocr_score, rouge_score

#: From this accuracy on a completion counts as having solved its prompt.
SOLVED = 0.999
_NUMBERS = (ProblemType.NUMERICAL, ProblemType.REGRESSION)


def accuracy_score(
    prompt: Prompt, text: str, *, numeric: NumericMode, max_answer_chars: int
) -> float:
    """Accuracy in [0, 1] of a whole completion: 0 without exactly one answer block.

    An answer of more than ``max_answer_chars`` (and 4 times the truth) characters scores 0 unread.
    """
    answer = extract_answer(text)
    if answer is None or len(answer) > max(max_answer_chars, 4 * len(prompt.answer)):
        return 0.0
    return answer_score(prompt, answer, numeric)


def answer_score(prompt: Prompt, answer: str, numeric: NumericMode = "rmae") -> float:
    """Accuracy in [0, 1] of an extracted answer, by ``prompt.problem_type`` (docs/method.md 1.5).

    ``numeric`` applies to NUMERICAL; REGRESSION is always rMAE. A truth that does not fit its type
    (a multiple choice without a letter, a number without digits) is compared as normalised text.
    """
    kind, truth = prompt.problem_type, prompt.answer
    if kind is ProblemType.OCR:
        return ocr_score(answer, truth)
    if kind is ProblemType.FREE_FORM:
        return rouge_score(answer, truth)
    if kind is ProblemType.LOCALISATION:
        return localisation_score(answer, truth)
    if kind is ProblemType.MULTI_LABEL:
        return multi_label_score(answer, truth, prompt.options)
    if kind is ProblemType.MULTIPLE_CHOICE:
        letter = choice_letter(truth, prompt.options)
        if letter is not None:
            return float(choice_letter(answer, prompt.options) == letter)
    if kind in _NUMBERS:
        number = stated_number(truth)
        if number is not None:
            given = stated_number(answer)
            mode: NumericMode = "rmae" if kind is ProblemType.REGRESSION else numeric
            return 0.0 if given is None else numeric_score(given, number, mode)
    return float(normalise(answer) == normalise(truth))


def canonical_answer(prompt: Prompt, answer: str) -> Hashable | None:
    """Normal form under which two answers to this prompt count as the same; None for one that says
    nothing usable.

    A letter, a number to two decimals, slots, labels or normalised text; a hedge gives None, so it
    cannot win a vote."""
    kind = prompt.problem_type
    if kind is ProblemType.MULTIPLE_CHOICE and (
        choice_letter(prompt.answer, prompt.options) is not None
    ):
        return choice_letter(answer, prompt.options)
    if kind in _NUMBERS and stated_number(prompt.answer) is not None:
        number = stated_number(answer)
        return (
            None if number is None else round(number, 2) + 0.0
        )  # + 0.0: -0.0 and 0.0 are one answer
    if kind is ProblemType.LOCALISATION and parse_slots(prompt.answer):
        slots = parse_slots(answer)
        return frozenset(slots.items()) if slots and None not in slots.values() else None
    if kind is ProblemType.MULTI_LABEL:
        return parse_labels(answer, prompt.options) or None
    return normalise(answer) or None
