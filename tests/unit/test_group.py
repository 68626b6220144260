"""What is made of a finished request: the scored group, or the reason why there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from avatar_rl.actors.groups import UnusableGroupError, completion_facts, make_group
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.buffer_service.records.validate import check_group

LEASE = RequestLease(
    request=RolloutRequest(seq=3, prompt_id="p", step=1, n=3),
    attempt=1,
    consumer="rollout-0",
    hinted=False,
)
SCORED, MASKED = (0.5, {"accuracy": 0.5}), (None, {"accuracy": None})


def finished(*lengths: int) -> Any:
    """A finished request with completions of these lengths."""
    completions = [
        SimpleNamespace(
            token_ids=np.arange(length, dtype=np.int32),
            logprobs=-np.ones(length, dtype=np.float32),
            finish_reason="stop",
            versions=((2, length),),
            text="",
        )
        for length in lengths
    ]
    return SimpleNamespace(prompt_token_ids=[1, 2, 3], completions=completions)


def group_of(lengths: list[int], scores: list[Any]) -> Any:
    return make_group(finished(*lengths), LEASE, scores, temperature=1.0)


def test_masked_and_empty_completions_are_left_out() -> None:
    group = group_of([2, 0, 4, 1], [MASKED, SCORED, SCORED, SCORED])
    assert [len(t.token_ids) for t in group.trajectories] == [4, 1]
    assert [t.id for t in group.trajectories] == ["00000003.0", "00000003.1"]
    check_group(group)


@pytest.mark.parametrize(
    ("lengths", "scores", "reason"),
    [
        ([2, 3], [MASKED, MASKED], "unscored"),
        ([0, 0], [SCORED, SCORED], "empty"),
        ([0, 2], [SCORED, MASKED], "unscored"),
    ],
)
def test_a_group_without_a_usable_completion_says_why(
    lengths: list[int], scores: list[Any], reason: str
) -> None:
    with pytest.raises(UnusableGroupError, match="group 00000003 of prompt 'p'") as caught:
        group_of(lengths, scores)
    assert caught.value.reason == reason


def test_an_empty_completion_has_facts() -> None:
    assert completion_facts(finished(0, 2)) == [("", True, 0.0, 0), ("", True, -1.0, 2)]
