"""Packing, sharing out and collating: every row once, within the budget, each prompt carried
once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatar_rl.learner.batch.microbatch import Pending, Row, Size, collate, pack, padded, share_out
from avatar_rl.learner.model.policy import RUN_GAIN, length_runs
from avatar_rl.prompts.encoding.template import EncodedPrompt

PROMPTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)  # prompt tokens by prompt number


@st.composite
def rows_of(draw: st.DrawFn) -> list[Size]:
    """Rows of up to six prompts in any order; a prompt's length is one number."""
    lengths = draw(PROMPTS)
    picks = draw(
        st.lists(st.tuples(st.integers(0, len(lengths) - 1), st.integers(1, 40)), max_size=24)
    )
    return [Size((f"p{prompt}", False), lengths[prompt], tokens) for prompt, tokens in picks]


def cost(batch: list[int], sizes: list[Size], share_prefix: bool) -> int:
    """Padded tokens the model computes for a micro-batch, by the definition."""
    prompts = {sizes[i].key for i in batch} if share_prefix else batch
    longest_prompt = max(sizes[i].prompt_tokens for i in batch)
    return len(prompts) * longest_prompt + len(batch) * max(sizes[i].tokens for i in batch)


@settings(max_examples=200, deadline=None)
@given(sizes=rows_of(), budget=st.integers(1, 300), share_prefix=st.booleans())
def test_packing_keeps_the_budget_and_covers_every_row_once(
    sizes: list[Size], budget: int, share_prefix: bool
) -> None:
    batches = pack(sizes, budget, share_prefix=share_prefix)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or cost(batch, sizes, share_prefix) <= budget
    assert batches == pack(sizes, budget, share_prefix=share_prefix)


@settings(max_examples=200, deadline=None)
@given(sizes=rows_of(), budget=st.integers(1, 300))
def test_rows_of_a_prompt_are_neighbours(sizes: list[Size], budget: int) -> None:
    order = [sizes[i].key for batch in pack(sizes, budget, share_prefix=True) for i in batch]
    runs = 1 + sum(left != right for left, right in pairwise(order)) if order else 0
    assert runs == len(set(order))


def test_packing_by_hand() -> None:
    a, b = ("a", False), ("b", False)
    sizes = [Size(a, 10, 4), Size(b, 12, 6), Size(a, 10, 8), Size(a, 10, 5)]
    # a alone: 10 + 3 x 8 = 34; with b: 2 x 12 + 4 x 8 = 56.
    assert pack(sizes, 56, share_prefix=True) == [[0, 3, 2, 1]]
    assert pack(sizes, 55, share_prefix=True) == [[0, 3, 2], [1]]
    assert pack(sizes, 33, share_prefix=True) == [[0, 3], [2], [1]]
    # Each with its own copy: the shortest first, two of them 2 x 10 + 2 x 5 = 30.
    assert pack(sizes, 30, share_prefix=False) == [[0, 3], [2], [1]]
    assert pack([], 100, share_prefix=True) == []


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_runs_cover_every_completion_and_each_one_pays(lengths: list[int]) -> None:
    runs = length_runs(lengths)
    assert Counter(i for run in runs for i in run) == Counter(range(len(lengths)))
    padded_at_once = len(lengths) * max(lengths)
    computed = sum(len(run) * max(lengths[i] for i in run) for run in runs)
    assert padded_at_once - computed >= RUN_GAIN * (len(runs) - 1)
    for longer, shorter in pairwise(runs):
        assert min(lengths[i] for i in longer) >= max(lengths[i] for i in shorter)


def test_runs_by_hand() -> None:
    assert length_runs([10, 300, 20, 290]) == [
        [1, 3],
        [2, 0],
    ]  # (300 - 20) x 2 saved; (20 - 10) x 1 is not worth it
    assert length_runs([7, 7, 7]) == [[0, 1, 2]]


def test_a_hinted_prompt_is_another_prompt() -> None:
    sizes = [Size(("a", hinted), 10, 5) for hinted in (False, True)]
    assert pack(sizes, 20, share_prefix=True) == [[0], [1]]
    assert pack(sizes, 30, share_prefix=True) == [[0, 1]]


@settings(max_examples=100, deadline=None)
@given(sizes=rows_of(), budget=st.integers(20, 200), ranks=st.integers(1, 5))
def test_ranks_share_every_micro_batch_once_and_evenly(
    sizes: list[Size], budget: int, ranks: int
) -> None:
    batches = pack(sizes, budget, share_prefix=True)
    shares = share_out(batches, sizes, ranks)
    assert len(shares) == ranks
    assert sorted(batch for share in shares for batch in share) == sorted(batches)

    def load(share: list[list[int]]) -> int:
        return sum(
            sum(sizes[i].tokens for i in batch)
            + sum(n for _, n in {(sizes[i].key, sizes[i].prompt_tokens) for i in batch})
            for batch in share
        )

    # Heaviest first onto the least loaded: ranks differ by at most one micro-batch.
    if batches:
        assert max(map(load, shares)) - min(map(load, shares)) <= max(
            load([batch]) for batch in batches
        )


def encoded(ids: list[int], **features: torch.Tensor) -> EncodedPrompt:
    length = len(ids)
    positions = torch.arange(length).expand(3, -1) + torch.tensor([[0], [100], [200]])
    return EncodedPrompt(torch.tensor(ids), positions, 300 + length, features)


def test_collate_lays_out_prompts_once_and_completions_left_aligned() -> None:
    short = encoded(
        [7, 8], input_features=torch.full((1, 4, 5), 1.0), feature_attention_mask=torch.ones(1, 5)
    )
    long = encoded(
        [1, 2, 3],
        input_features=torch.full((2, 4, 3), 2.0),
        feature_attention_mask=torch.ones(2, 3),
        pixel_values=torch.full((6, 2), 3.0),
    )
    rows = [
        Row(("s", False), short, np.array([11, 12, 13], dtype=np.int32), 0.7),
        Row(("l", False), long, np.array([21], dtype=np.int32)),
        Row(("s", False), short, np.array([14], dtype=np.int32)),
    ]
    batch = collate(rows, share_prefix=True)
    assert batch.prompt_ids.tolist() == [[7, 8, 0], [1, 2, 3]]
    assert batch.prompt_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.prompt_positions.tolist() == [
        [[0, 1, 0], [0, 1, 2]],
        [[100, 101, 0], [100, 101, 102]],
        [[200, 201, 0], [200, 201, 202]],
    ]
    assert batch.next_positions.tolist() == [302, 303]
    assert batch.rows.tolist() == [0, 1, 0]
    assert batch.token_ids.tolist() == [[11, 12, 13], [21, 0, 0], [14, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    torch.testing.assert_close(batch.temperature, torch.tensor([0.7, 1.0, 1.0]))
    # Media of the prompts in their order, sounds padded to the widest.
    assert batch.features["input_features"].shape == (3, 4, 5)
    assert batch.features["feature_attention_mask"].tolist() == [
        [1] * 5,
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]
    assert batch.features["input_features"][1, 0].tolist() == [2, 2, 2, 0, 0]
    assert batch.features["pixel_values"].shape == (6, 2)
    pending = Pending(rows, share_prefix=True)
    assert pending.features == batch.features.keys()
    assert pending.tokens == batch.tokens == 5
    assert torch.equal(pending.collate().token_ids, batch.token_ids)
    copied = collate(rows, share_prefix=False)
    assert copied.rows.tolist() == [0, 1, 2]
    assert copied.prompt_ids.tolist() == [[7, 8, 0], [1, 2, 3], [7, 8, 0]]
    assert copied.features["input_features"].shape == (4, 4, 5)


def test_values_per_token_are_padded_with_zero() -> None:
    values = padded([np.array([-1.5, -0.5], dtype=np.float32), np.array([-2.0], dtype=np.float32)])
    assert values.dtype == torch.float32
    assert values.tolist() == [[-1.5, -0.5], [-2.0, 0.0]]
