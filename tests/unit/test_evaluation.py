"""Evaluation rounds: averages by type and need, and when a target is reached."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from avatar_rl.cluster.config import EvaluationConfig
from avatar_rl.cluster.training.evaluation import EvaluationRounds, summarise

ANSWERS = [
    ("a", "colour", ["video"], 1.0),
    ("b", "colour", ["video"], 0.0),
    ("c", "beeps", ["audio"], 0.5),
    ("d", "count", ["video", "audio"], None),  # masked: left out
]


def payloads() -> list[bytes]:
    return [
        json.dumps(
            {"prompt_id": i, "category": c, "needs": n, "accuracy": a, "version": 3, "tokens": 2}
        ).encode()
        for i, c, n, a in ANSWERS
    ]


def test_averages_are_over_prompts_and_masked_ones_are_left_out() -> None:
    found = summarise(1, payloads(), selected={"a", "b", "d"})
    assert found.accuracy == 0.5 and found.prompts == 3 and found.tokens == 8 and found.version == 3
    assert found.by_category == {"beeps": 0.5, "colour": 0.5} and found.by_need == {
        "audio": 0.5,
        "video": 0.5,
    }
    assert found.selected == 0.5 and found.metrics()["eval/selected"] == 0.5
    told = found.metrics()
    assert told["eval/prompts"] == found.prompts == sum(found.counts.values())
    assert sum(found.need_counts.values()) == found.prompts
    assert found.counts.keys() == found.by_category.keys()
    assert "eval/selected" not in summarise(1, payloads()).metrics()


@pytest.mark.parametrize(
    ("selected", "target", "reached"),
    [
        (("a",), 0.9, True),
        (("b",), 0.9, False),
        ((), 0.5, True),
        ((), 0.6, False),
        (("a",), None, False),
    ],
)
def test_a_target_is_for_the_selected_types_or_all(
    selected: tuple[str, ...], target: float | None, reached: bool
) -> None:
    nothing = cast(Any, None)
    rounds = EvaluationRounds(EvaluationConfig(), nothing, [], nothing, nothing, selected=selected)
    assert not rounds.reached(target)
    rounds.results.append(summarise(1, payloads(), selected=rounds.selected))
    assert rounds.reached(target) is reached
