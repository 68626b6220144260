"""Attention inside a pack: a token looks at its prompt and at what precedes it in its own
completion, as far as the model's layer lets it.

What a layer lets it (all, a sliding window, a chunk) is the model's own rule over two places in a
sequence. It is asked for the places in [prompt, own completion], never for columns of the pack. So
the function registers with transformers under ``NAME``: a model that is set to it hands its rule to
``_mask`` and its queries, keys and values to ``_attention``.

On a GPU one FlexAttention kernel runs over the pack. On a CPU each prompt and each run of its
completions is a call of its own: nothing is computed between strangers, and no mask is as large as
the pack. Under sequence parallelism (sequence.py) a rank attends from and to the whole pack, with
its share of the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rl.learner.batch.microbatch import Tree
from avatar_rl.learner.model.sequence import SequenceGroup

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "avatar_pack"
#: Completion positions that are attended from in one call on a CPU, beyond a quarter of the prompt.
RUN = 128

#: (batch, head, query place, key place) -> whether the query sees the key; tensors of any shape.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_pack: ContextVar[tuple[tuple[Tree, ...], SequenceGroup | None] | None] = ContextVar(
    "pack", default=None
)


@contextmanager
def packed(trees: tuple[Tree, ...], sequence: SequenceGroup | None = None) -> Iterator[None]:
    """Masks that a model makes inside the ``with`` are those of a pack, of which the ranks of
    ``sequence`` hold slices."""
    token = _pack.set((trees, sequence))
    try:
        yield
    finally:
        _pack.reset(token)


class Block(NamedTuple):
    """Queries of one call, in order of the pack, and the keys they look at."""

    first: int
    last: int  # exclusive
    keys: tuple[slice, ...]
    mask: Tensor | None  # (queries, keys) bool; None = causal from the first key on


@dataclass(frozen=True)
class PackMask:
    """Who sees whom in a pack, under one rule of the model. Made once per forward and rule."""

    trees: tuple[Tree, ...]
    rule: Rule
    is_causal: bool  # the rule is: nothing but what comes before
    device: torch.device
    sequence: SequenceGroup | None = None

    @property
    def positions(self) -> int:
        """Of the pack."""
        return sum(tree.prompt + sum(tree.completions) for tree in self.trees)

    def _sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(Q, K) bool of places in one sequence."""
        zero = torch.zeros((), dtype=torch.long, device=self.device)
        found = self.rule(zero, zero, queries[:, None], keys[None])
        return found.expand(len(queries), len(keys))

    @cached_property
    def blocks(self) -> list[Block]:
        found: list[Block] = []
        for tree in self.trees:
            places = torch.arange(tree.prompt, device=self.device)
            end = tree.start + tree.prompt
            mask = None if self.is_causal else self._sees(places, places)
            found.append(Block(tree.start, end, (slice(tree.start, end),), mask))
            first = end
            for run in _runs(tree):
                last = first + sum(run)
                prompt, own = slice(tree.start, end), slice(first, last)
                keys = (slice(tree.start, last),) if first == end else (prompt, own)
                found.append(Block(first, last, keys, self._run_mask(tree.prompt, run)))
                first = last
        return found

    def _run_mask(self, prompt: int, run: Sequence[int]) -> Tensor:
        """(queries, prompt + queries) bool of neighbouring completions behind their prompt."""
        own = torch.cat([torch.arange(n, device=self.device) for n in run]) + prompt
        which = torch.repeat_interleave(
            torch.arange(len(run), device=self.device), torch.tensor(run, device=self.device)
        )
        places = torch.cat([torch.arange(prompt, device=self.device), own])
        owner = torch.cat([which.new_full((prompt,), -1), which])
        is_related = (owner[None] == -1) | (owner[None] == which[:, None])
        return self._sees(own, places) & is_related

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        place, segment, parent = self._labels()

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_related = (segment[query] == segment[key]) | (parent[query] == segment[key])
            allowed = self.rule(batch, head, place[query], place[key])
            return (query >= key) & is_related & allowed

        size, on_gpu = len(place), self.device.type == "cuda"
        # Compiled, it never holds a mask of size x size.
        return create_block_mask(
            sees, None, None, size, size, device=str(self.device), _compile=on_gpu
        )

    def _labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each position (N,): its place in its sequence, its segment, its prompt's segment."""
        place, segment, parent = [], [], []
        number = 0
        for tree in self.trees:
            owner = number
            for which, count in enumerate((tree.prompt, *tree.completions)):
                place.append(torch.arange(count) + (tree.prompt if which else 0))
                segment.append(torch.full((count,), number))
                parent.append(torch.full((count,), owner))
                number += 1
        return tuple(torch.cat(part).to(self.device) for part in (place, segment, parent))  # type: ignore[return-value]


def _runs(tree: Tree) -> list[list[int]]:
    """Completions of a prompt that are attended from in one call: what they waste on each other is
    small beside the prompt, which all of them look at."""
    limit = RUN + tree.prompt // 4
    runs: list[list[int]] = []
    for count in tree.completions:
        if not count:
            continue
        if not runs or sum(runs[-1]) + count > limit:
            runs.append([])
        runs[-1].append(count)
    return runs


def _mask(*, mask_function: Rule, device: torch.device, **others: Any) -> PackMask | Tensor | None:
    """What a model's layers get as attention mask: the pack's, or outside ``packed`` an ordinary
    one."""
    from transformers import masking_utils

    pack = _pack.get()
    if pack is None:
        return masking_utils.sdpa_mask(mask_function=mask_function, device=device, **others)
    is_causal = mask_function is masking_utils.causal_mask_function
    trees, sequence = pack
    return PackMask(trees, mask_function, is_causal, torch.device(device), sequence)


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, d); of a slice under sequence parallelism
    key: Tensor,  # (1, key heads, N, d)
    value: Tensor,
    attention_mask: PackMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # none: it would break the ratio of policies
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,  # what a model passes on to transformers
) -> tuple[Tensor, None]:
    """(1, N, heads, d) of a pack; transformers' own outside ``packed``."""
    from transformers.integrations import sdpa_attention

    if not isinstance(attention_mask, PackMask):
        return sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    sequence = attention_mask.sequence
    if sequence is None:
        return _of_pack(module, query, key, value, attention_mask, scaling, softcap, s_aux), None
    query, key, value = sequence.to_heads(query, key, value, attention_mask.positions)
    if s_aux is not None:
        s_aux = sequence.own_heads(s_aux)
    output = _of_pack(module, query, key, value, attention_mask, scaling, softcap, s_aux)
    return sequence.to_positions(output), None


def _of_pack(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, d)
    key: Tensor,
    value: Tensor,
    attention_mask: PackMask,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """(1, N, heads, d)."""
    from transformers.integrations import flex_attention, sdpa_attention

    if query.device.type == "cuda":
        output, _ = flex_attention.flex_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask.block_mask,
            scaling=scaling,
            softcap=softcap,
            s_aux=s_aux,
        )
        return output
    groups = query.shape[1] // key.shape[1]
    key, value = (sdpa_attention.repeat_kv(states, groups) for states in (key, value))
    outputs = []
    for block in attention_mask.blocks:
        queries = query[:, :, block.first : block.last]
        keys, values = (
            torch.cat([states[:, :, part] for part in block.keys], 2)
            if len(block.keys) > 1
            else states[:, :, block.keys[0]]
            for states in (key, value)
        )
        if softcap is None and s_aux is None:
            outputs.append(
                F.scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=block.mask,
                    is_causal=block.mask is None,
                    scale=scaling,
                )
            )
        else:
            outputs.append(_written_out(queries, keys, values, block.mask, scaling, softcap, s_aux))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with capped scores (Gemma 2) or with a sink per head (GPT-OSS), which torch's
    function does not know."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


def register() -> None:
    """Make ``NAME`` known to transformers."""
    from transformers import masking_utils, modeling_utils

    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    modeling_utils.ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
