"""Packing, sharing out and collating: every completion once, within the budget, each prompt carried
once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatar_rl.common.errors import ConfigError
from avatar_rl.learner.batch.microbatch import Pending, Row, Tree, collate, padded
from avatar_rl.learner.batch.packing import UNEVEN, Size, pack, share_out, split
from avatar_rl.prompts.encoding.embeddings import MediaEmbeddings
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


def cost(batch: list[int], sizes: list[Size]) -> int:
    """Tokens the model computes for a pack, by the definition."""
    prompts = {(sizes[i].key, sizes[i].prompt_tokens) for i in batch}
    return sum(length for _, length in prompts) + sum(sizes[i].tokens for i in batch)


@settings(max_examples=200, deadline=None)
@given(sizes=rows_of(), budget=st.integers(100, 300))
def test_packing_keeps_the_budget_and_covers_every_row_once(sizes: list[Size], budget: int) -> None:
    batches = pack(sizes, budget)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(sizes)))
    assert all(0 < cost(batch, sizes) <= budget for batch in batches)
    assert batches == pack(sizes, budget)
    # No two packs would have fitted into one: the later of them found no room in the earlier.
    costs = [cost(batch, sizes) for batch in batches]
    assert all(a + b > budget for i, a in enumerate(costs) for b in costs[:i])


@settings(max_examples=200, deadline=None)
@given(sizes=rows_of(), budget=st.integers(100, 300))
def test_a_prompt_is_computed_once_where_its_completions_fit_one_pack(
    sizes: list[Size], budget: int
) -> None:
    batches = pack(sizes, budget)
    for key in {size.key for size in sizes}:
        members = [i for i, size in enumerate(sizes) if size.key == key]
        places = [sum(i in members for i in batch) > 0 for batch in batches]
        if cost(members, sizes) <= budget:
            assert sum(places) == 1


def test_packing_by_hand() -> None:
    a, b = ("a", False), ("b", False)
    sizes = [Size(a, 10, 4), Size(b, 12, 6), Size(a, 10, 8), Size(a, 10, 5)]
    # a: 10 + 8 + 5 + 4 = 27, b: 12 + 6 = 18.
    assert pack(sizes, 45) == [[2, 3, 0, 1]]
    assert pack(sizes, 44) == [[2, 3, 0], [1]]
    # a takes two packs: 10 + 8 + 5 and 10 + 4.
    assert pack(sizes, 26) == [[2, 3], [1], [0]]
    assert pack(sizes, 32 + 5) == [[2, 3, 0], [1]]
    assert pack([], 100) == []


def test_a_prompt_and_completion_beyond_the_budget_are_named_with_the_key() -> None:
    sizes = [Size(("a", False), 10, 4), Size(("long", False), 90, 30), Size(("a", False), 10, 8)]
    with pytest.raises(ConfigError, match=r"'long' of 90 .* 30 exceed learner\.micro_batch_tokens"):
        pack(sizes, 119)
    assert pack(sizes, 120) == [[1], [2, 0]]
    with pytest.raises(ConfigError, match=r"cold_start\.micro_batch_tokens 119, .*at least 120"):
        pack(sizes, 119, name="cold_start")


def test_a_hinted_prompt_is_another_prompt() -> None:
    sizes = [Size(("a", hinted), 10, 5) for hinted in (False, True)]
    assert pack(sizes, 29) == [[0], [1]]
    assert pack(sizes, 30) == [[0, 1]]


@settings(max_examples=100, deadline=None)
@given(sizes=rows_of(), budget=st.integers(100, 200), ranks=st.integers(1, 5))
def test_ranks_share_every_pack_once_and_evenly(sizes: list[Size], budget: int, ranks: int) -> None:
    batches = pack(sizes, budget)
    shares = share_out(batches, sizes, ranks)
    assert len(shares) == ranks
    assert sorted(batch for share in shares for batch in share) == sorted(batches)
    loads = [sum(cost(batch, sizes) for batch in share) for share in shares]
    # Heaviest first onto the least loaded: ranks differ by at most one pack.
    if batches:
        assert max(loads) - min(loads) <= max(cost(batch, sizes) for batch in batches)


@settings(max_examples=100, deadline=None)
@given(sizes=rows_of(), budget=st.integers(100, 200), ranks=st.integers(1, 5))
def test_a_step_is_split_within_the_budget_and_never_worse_than_by_large_packs(
    sizes: list[Size], budget: int, ranks: int
) -> None:
    shares = split(sizes, budget, ranks)
    assert len(shares) == ranks and shares == split(sizes, budget, ranks)
    packs = [indices for share in shares for indices in share]
    assert sorted(i for indices in packs for i in indices) == list(range(len(sizes)))
    assert all(cost(indices, sizes) <= budget for indices in packs)

    def busiest(shares: list[list[list[int]]]) -> int:
        return max(sum(cost(indices, sizes) for indices in share) for share in shares)

    assert busiest(shares) <= busiest(share_out(pack(sizes, budget), sizes, ranks))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_step_that_fits_one_pack_keeps_every_rank_about_equally_busy(ranks: int) -> None:
    sizes = [Size((f"p{i // 4}", False), 30, 40) for i in range(64)]
    shares = split(sizes, 16_384, ranks)
    loads = [sum(cost(indices, sizes) for indices in share) for share in shares]
    assert max(loads) <= UNEVEN * sum(loads) / ranks
    assert sum(loads) == 16 * 30 + 64 * 40  # no prompt is computed twice
    assert split(sizes, 16_384, 1) == [pack(sizes, 16_384)]


def test_a_group_of_one_long_prompt_is_spread_where_that_pays() -> None:
    short = [Size(("p", False), 100, 500)] * 8  # 4,100 tokens; 2,100 on each of two ranks
    assert [len(share) for share in split(short, 16_384, 2)] == [1, 1]
    long = [Size(("p", False), 10_000, 50)] * 8  # 10,400 together, 10,200 on each of two
    assert sorted(len(share) for share in split(long, 16_384, 2)) == [0, 1]


def encoded(ids: list[int], **features: torch.Tensor) -> EncodedPrompt:
    length = len(ids)
    positions = torch.arange(length).expand(3, -1) + torch.tensor([[0], [100], [200]])
    return EncodedPrompt(torch.tensor(ids), positions, 300 + length, features)


SHORT = encoded(
    [7, 8], input_features=torch.full((1, 4, 5), 1.0), feature_attention_mask=torch.ones(1, 5)
)
LONG = encoded(
    [1, 2, 3],
    input_features=torch.full((2, 4, 3), 2.0),
    feature_attention_mask=torch.ones(2, 3),
    pixel_values=torch.full((6, 2), 3.0),
)


def test_collate_lays_each_prompt_before_its_completions() -> None:
    rows = [
        Row(("s", False), SHORT, np.array([11, 12, 13], dtype=np.int32), 0.7),
        Row(("l", False), LONG, np.array([21], dtype=np.int32)),
        Row(("s", False), SHORT, np.array([14, 15], dtype=np.int32)),
    ]
    batch = collate(rows)
    # The last token of a completion predicts nothing that is asked for.
    assert batch.input_ids.tolist() == [7, 8, 11, 12, 14, 1, 2, 3]
    assert batch.positions.tolist() == [
        [0, 1, 302, 303, 302, 0, 1, 2],
        [100, 101, 302, 303, 302, 100, 101, 102],
        [200, 201, 302, 303, 302, 200, 201, 202],
    ]
    assert batch.trees == (Tree(0, 2, (2, 1)), Tree(5, 3, (0,)))
    assert batch.predicts.tolist() == [[1, 2, 3], [7, 0, 0], [1, 4, 0]]
    assert batch.token_ids.tolist() == [[11, 12, 13], [21, 0, 0], [14, 15, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
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
    assert batch.encoded.tolist() == [True, True, False, False, False, True, True, True]
    assert batch.media is None
    pending = Pending(rows)
    assert pending.encoders == batch.encoders == {"image", "audio"}
    assert pending.tokens == batch.tokens == 6
    assert torch.equal(pending.collate().input_ids, batch.input_ids)


def test_embeddings_of_media_take_the_place_of_pixels() -> None:
    """A prompt with embeddings brings no media tensors; its places move with it."""
    known = MediaEmbeddings(
        torch.tensor([1, 2]), torch.ones(2, 4), torch.tensor([2]), torch.ones(3, 1, 4)
    )
    rows = [
        Row(("s", False), SHORT, np.array([11, 12], dtype=np.int32)),
        Row(("l", False), LONG, np.array([21], dtype=np.int32), media=known),
    ]
    batch = collate(rows)
    assert batch.input_ids.tolist() == [7, 8, 11, 1, 2, 3]
    assert batch.features.keys() == {"input_features", "feature_attention_mask"}
    assert batch.encoded.tolist() == [True, True, False, False, False, False]
    assert batch.media is not None and batch.media.places.tolist() == [4, 5]
    assert batch.media.visual_places is not None
    assert batch.media.visual_places.tolist() == [5]
    assert Pending(rows).encoders == batch.encoders == {"audio"}
    two = MediaEmbeddings.merged([known, known.moved(10)])
    assert two is not None and two.deepstack is not None and two.visual_places is not None
    assert two.places.tolist() == [1, 2, 11, 12] and two.visual_places.tolist() == [2, 12]
    assert two.deepstack.shape == (3, 2, 4)


def test_values_per_token_are_padded_with_zero() -> None:
    values = padded([np.array([-1.5, -0.5], dtype=np.float32), np.array([-2.0], dtype=np.float32)])
    assert values.dtype == torch.float32
    assert values.tolist() == [[-1.5, -0.5], [-2.0, 0.0]]
