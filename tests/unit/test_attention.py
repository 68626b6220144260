"""Attention in a pack: call by call on a CPU, and FlexAttention's block mask, against one dense
mask by the definition."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from avatar_rl.learner.batch.microbatch import Tree
from avatar_rl.learner.model import attention
from avatar_rl.learner.model.attention import PackMask

TREES = (Tree(0, 9, (4, 0, 7, 3)), Tree(23, 2, (6,)), Tree(31, 5, ()))
SIZE = 36
WINDOW = 4
KINDS: dict[str, Callable[[int, int], bool]] = {
    "full": lambda q, k: k <= q,
    "window": lambda q, k: q - WINDOW < k <= q,
    "chunk": lambda q, k: k <= q and q // WINDOW == k // WINDOW,
}


def masks() -> ModuleType:
    """transformers' masks. They bring half of torch: seconds, so not for whoever collects this."""
    return importlib.import_module("transformers.masking_utils")


def rule(kind: str) -> attention.Rule:
    """transformers' own rule of a layer."""
    if kind == "full":
        return masks().causal_mask_function  # type: ignore[return-value]
    if kind == "window":
        return masks().sliding_window_causal_mask_function(WINDOW)  # type: ignore[return-value]
    none = torch.zeros(1, dtype=torch.long)
    return masks().chunked_causal_mask_function(WINDOW, none)  # type: ignore[return-value]


def dense(kind: str) -> Tensor:
    """(N, N) bool: a token sees its prompt and its own completion, by places in the two."""
    places = []  # tree, completion (None = prompt), place in prompt + completion
    for number, tree in enumerate(TREES):
        places += [(number, None, place) for place in range(tree.prompt)]
        for which, count in enumerate(tree.completions):
            places += [(number, which, tree.prompt + place) for place in range(count)]
    sees = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for q, (tree, own, place) in enumerate(places):
        for k, (other, theirs, their_place) in enumerate(places):
            related = tree == other and (theirs is None or theirs == own)
            sees[q, k] = related and KINDS[kind](place, their_place)
    return sees


def states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads, two of keys and values."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, heads, SIZE, 16, generator=generator).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    )  # type: ignore[return-value]


def mask_of(kind: str) -> PackMask:
    """As a model of transformers asks for it."""
    attention.register()
    config = SimpleNamespace(_attn_implementation=attention.NAME, is_causal=True)
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(1, SIZE, 8),
        "attention_mask": torch.ones(1, SIZE, dtype=torch.long),
        "past_key_values": None,
    }
    with attention.packed(TREES):
        if kind == "full":
            return masks().create_causal_mask(**arguments)
        config.sliding_window = config.attention_chunk_size = WINDOW
        if kind == "window":
            return masks().create_sliding_window_causal_mask(**arguments)
        return masks().create_chunked_causal_mask(**arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [1, 8, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_per_prompt_and_run_equal_one_dense_mask(
    monkeypatch: pytest.MonkeyPatch, kind: str, run: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention, "RUN", run)
    given = states(dtype)
    mask = mask_of(kind)
    assert len(mask.blocks) == 4 + {1: 3, 8: 2, 1000: 1}[run]
    output, _ = attention._attention(torch.nn.Identity(), *given, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        given[0],
        *(part.repeat_interleave(2, 1) for part in given[1:]),
        attn_mask=dense(kind),
        scale=0.3,
    ).transpose(1, 2)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad((output * weights).sum(), given)
    wanted = torch.autograd.grad((expected * weights).sum(), given)
    loose = 1e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(found, wanted, atol=loose, rtol=loose)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
def test_the_block_mask_of_a_gpu_equals_the_dense_mask(kind: str) -> None:
    """FlexAttention's forward runs on a CPU too, uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    with torch.no_grad():
        query, key, value = (part.detach() for part in states())
        output = flex_attention(
            query, key, value, block_mask=mask_of(kind).block_mask, enable_gqa=True, scale=0.3
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            query,
            *(part.repeat_interleave(2, 1) for part in (key, value)),
            attn_mask=dense(kind),
            scale=0.3,
        )
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_capped_scores_and_sinks_are_written_out(kind: str, sinks: Tensor | None) -> None:
    query, key, value = states()
    output, _ = attention._attention(
        torch.nn.Identity(), query, key, value, mask_of(kind), scaling=0.3, softcap=1.5, s_aux=sinks
    )
    key, value = (part.repeat_interleave(2, 1) for part in (key, value))
    scores = 1.5 * torch.tanh(query @ key.transpose(2, 3) * 0.3 / 1.5)
    weights = scores.exp() * dense(kind)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    torch.testing.assert_close(output, (weights / total @ value).transpose(1, 2), atol=2e-6, rtol=0)


def test_outside_a_pack_masks_are_the_ordinary_ones() -> None:
    attention.register()
    config = SimpleNamespace(_attn_implementation=attention.NAME, is_causal=True)
    padded = torch.tensor([[0, 1, 1]])
    mask = masks().create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 3, 8),
        attention_mask=padded,
        past_key_values=None,
    )
    assert mask[0, 0].tolist()[1:] == [[False, True, False], [False, True, True]]
