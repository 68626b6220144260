"""The parity probe names the prompt at fault and what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from avatar_rl.cluster.training.parity import check_adopted, check_parity
from avatar_rl.common.errors import ModelError


def a_pair(
    *, text: str = "red", tokens: tuple[int, ...] = (1, 2, 3), shift: float = 0.0
) -> tuple[list[Any], list[Any]]:
    """What engine and learner say of two prompts; the learner differs in the second as told."""
    logprobs = np.array([-0.5, -1.0], dtype=np.float32)
    asked = [
        {
            "prompt_id": name,
            "prompt_token_ids": np.array([1, 2, 3]),
            "token_ids": np.array([7, 8]),
            "logprobs": logprobs,
            "text": text,
        }
        for name in ("p0", "p1")
    ]
    seen = [
        {"prompt_token_ids": np.array([1, 2, 3]), "placeholders": {}, "logprobs": logprobs},
        {
            "prompt_token_ids": np.array(tokens),
            "placeholders": {"video": [4]},
            "logprobs": logprobs + shift,
        },
    ]
    return asked, seen


def test_sides_that_agree_pass_with_their_difference() -> None:
    found = check_parity(*a_pair(shift=0.01), tolerance=0.04)
    assert (found.prompts, found.tokens) == (2, 4)
    for value in (found.mean, found.p99, found.max_difference):
        assert value == pytest.approx(0.01, abs=1e-6)


@pytest.mark.parametrize(
    ("noise", "outliers", "fine"),
    [
        (0.03, 0, True),  # bfloat16 as it is
        (0.03, 2, True),  # single tokens, however far
        (0.03, 8, False),
        (0.1, 0, False),  # a little, everywhere
    ],
)
def test_the_average_and_nearly_all_tokens_count_not_the_worst(
    noise: float, outliers: int, fine: bool
) -> None:
    asked, seen = a_pair()
    rng = np.random.default_rng(0)
    for item, view in zip(asked, seen, strict=True):
        item["token_ids"], item["logprobs"] = np.arange(128), np.full(128, -1.0)
        view["logprobs"] = item["logprobs"] + rng.choice([-noise, noise], 128)
    seen[1]["logprobs"][:outliers] += 0.9
    if fine:
        found = check_parity(asked, seen, tolerance=0.3)
        assert found.mean < 0.05 and (found.max_difference > 0.5) == (outliers > 0)
    else:
        with pytest.raises(ModelError, match=r"prompt 'p[01]'.*on average"):
            check_parity(asked, seen, tolerance=0.3)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (a_pair(tokens=(1, 2)), "prompt 'p1': the engine expands it to 3 tokens, the learner to 2"),
        (a_pair(tokens=(1, 2, 9)), "prompt 'p1': token 2 is 3 for the engine and 9"),
        (a_pair(shift=0.1), "prompt 'p1': log-probabilities .* differ by 1.00e-01 on average"),
        (a_pair(shift=float("nan")), "log-probabilities"),
        (a_pair(text=" "), "all 2 probe completions are empty"),
    ],
)
def test_what_differs_is_named(pair: tuple[list[Any], list[Any]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_parity(*pair, tolerance=0.02)


def test_media_are_blamed_only_where_there_are_any() -> None:
    asked, seen = a_pair(shift=0.1)
    with pytest.raises(ModelError, match="media inputs, positions or weights"):
        check_parity(asked, seen, tolerance=0.02)
    seen[1]["placeholders"] = {}
    with pytest.raises(ModelError, match="positions or weights are not the same") as caught:
        check_parity(asked, seen, tolerance=0.02)
    assert "media" not in str(caught.value) and "beside others" in str(caught.value)


def test_engines_that_did_not_take_an_update_in_end_the_run() -> None:
    for fine in (
        {},
        {"mismatch/on_policy": 9.0, "mismatch/on_policy_tokens": 31.0},  # too few to tell
        {"mismatch/on_policy": 0.04, "mismatch/on_policy_tokens": 4000.0},
    ):
        check_adopted(fine, 0.3)
    for gap in (0.2, float("nan")):
        stale = {"mismatch/on_policy": gap, "mismatch/on_policy_tokens": 64.0}
        with pytest.raises(ModelError, match=r"64 tokens.*left something stale.*probe\.tolerance"):
            check_adopted(stale, 0.3)
