"""Which prompts a stage asks."""

from __future__ import annotations

import pytest

from avatar_rl.common.errors import DataError
from avatar_rl.prompts.record import Modality, ProblemType, Prompt
from avatar_rl.prompts.selection import SelectionConfig, matching, select


def prompt(name: str, category: str, kind: ProblemType, *needs: Modality) -> Prompt:
    return Prompt(
        id=name, question="?", answer="x", problem_type=kind, category=category, needs=needs
    )


WORLD = [
    prompt("a", "colour", ProblemType.FREE_FORM, "video"),
    prompt("b", "beeps", ProblemType.NUMERICAL, "audio"),
    prompt("c", "count", ProblemType.NUMERICAL, "video", "audio"),
    prompt("d", "side", ProblemType.MULTIPLE_CHOICE, "video"),
]


@pytest.mark.parametrize(
    ("selection", "ids"),
    [
        ({}, "abcd"),
        ({"categories": ["side", "colour"]}, "ad"),
        ({"problem_types": ["numerical"]}, "bc"),
        ({"needs": [["audio", "video"]]}, "c"),
        ({"needs": [["audio"], ["video"]]}, "abd"),
        ({"categories": ["beeps", "count"], "needs": [["audio"]]}, "b"),
    ],
)
def test_a_prompt_passes_every_list_that_is_not_empty(
    selection: dict[str, object], ids: str
) -> None:
    assert "".join(select(WORLD, SelectionConfig.model_validate(selection))) == ids


def test_held_out_prompts_match_nothing_where_nothing_is_selected() -> None:
    assert matching(WORLD, SelectionConfig()) == []
    assert matching(WORLD, SelectionConfig(categories=("beeps",))) == ["b"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"categories": ["color"]}, r"question type 'color'; there are beeps \(1\), colour \(1\)"),
        ({"problem_types": ["ocr"]}, "problem type 'ocr'"),
        ({"needs": [["image"]]}, "need 'image'"),
        (
            {"categories": ["beeps"], "needs": [["video"]]},
            r"passes all of the selection \(beeps, video\)",
        ),
    ],
)
def test_a_type_without_prompts_is_named(selection: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        select(WORLD, SelectionConfig.model_validate(selection))
