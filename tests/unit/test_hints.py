"""Hints that hold the answer, in whatever spelling."""

from __future__ import annotations

import pytest

from avatar_rl.prompts.hints import hint_leaks
from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.prompts.synthetic.config import Category
from avatar_rl.prompts.synthetic.questions import draft

P = ProblemType


def prompt(kind: ProblemType, answer: str, hint: str, options: tuple[str, ...] = ()) -> Prompt:
    return Prompt(
        id="p", question="?", answer=answer, problem_type=kind, hint=hint, options=options
    )


COLOURS = ("A. red", "B. green", "C. the middle")


@pytest.mark.parametrize(
    ("kind", "answer", "hint", "leaks"),
    [
        (P.NUMERICAL, "3", "There are three beeps.", True),
        (P.NUMERICAL, "three", "Count to 3.", True),
        (P.NUMERICAL, "3", "Count all 13 beeps.", False),
        (P.NUMERICAL, "3", "It lasts 3.5 seconds.", False),
        (P.NUMERICAL, "3.0", "Count, and expect 3.", True),
        (P.NUMERICAL, "1", "Go through the parts one by one.", False),
        (P.NUMERICAL, "1", "The answer is 1.", True),
        (P.FREE_FORM, "No", "There is no hurry: listen again.", False),
        (P.FREE_FORM, "No", "The answer is no.", True),
        (P.FREE_FORM, "the red  disc", "Look at THE *red disc*!", True),
        (P.FREE_FORM, "red", "Covered shapes may hide.", False),
        (P.FREE_FORM, "center", "Look at the middle.", True),
        (P.MULTIPLE_CHOICE, "B", "Is it (B)?", True),
        (P.MULTIPLE_CHOICE, "A", "A shape moves.", False),
        (P.MULTIPLE_CHOICE, "B", "Think of something green.", True),
        (P.MULTIPLE_CHOICE, "B", "Is it red, green or in the middle?", False),
        (P.MULTIPLE_CHOICE, "C", "Search at the centre.", True),
        (P.LOCALISATION, "Left: cyclist / Center: girl", "Someone on the left is a cyclist.", True),
        (
            P.LOCALISATION,
            "Left: cyclist / Center: girl",
            "A girl and a cyclist can be heard.",
            True,
        ),
        (P.LOCALISATION, "Left: cyclist / Center: girl", "Start on the left and go right.", False),
        (P.MULTI_LABEL, "dog, cat", "A dog and a cat.", True),
        (P.MULTI_LABEL, "dog, cat", "Is there a dog?", False),
    ],
)
def test_leaks(kind: ProblemType, answer: str, hint: str, leaks: bool) -> None:
    options = COLOURS if kind is P.MULTIPLE_CHOICE else ()
    assert hint_leaks(prompt(kind, answer, hint, options)) is leaks


@pytest.mark.parametrize("category", Category)
def test_no_hint_of_the_synthetic_world_leaks(category: Category) -> None:
    import numpy as np

    for turn in range(24):
        question = draft(category, np.random.default_rng(turn), turn)
        assert not hint_leaks(
            prompt(question.problem_type, question.answer, question.hint, question.options)
        )
