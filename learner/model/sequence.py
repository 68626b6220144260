"""Sequence parallelism: the ranks of a group hold neighbouring slices of each pack.

Norms, projections, MLPs and the head work on a slice. Attention needs every position: there a rank
gives its slice of most heads away and gets all positions of its own heads, by an all-to-all, and
back after it (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509).

Every rank of a group then knows the log-probabilities of the whole pack and computes the same loss.
Its backward pass brings the part of the gradient that its slice has in it: parts add up over the
group, as those of different packs do over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avatar_rl.common.errors import ModelError


class SequenceGroup:
    """``size`` neighbouring ranks that share each pack. Made on all ranks at the same time; its
    other methods, but for ``span``, are collective over the group."""

    def __init__(
        self, size: int, *, rank: int, ranks: int, timeout: timedelta | None = None
    ) -> None:
        self.size, self.place = size, rank % size
        groups = [
            dist.new_group(list(range(first, first + size)), timeout=timeout)
            for first in range(0, ranks, size)
        ]
        self._group = groups[rank // size]

    def sizes(self, positions: int) -> list[int]:
        """Positions of each rank's slice of a pack; they differ by one at most."""
        each, more = divmod(positions, self.size)
        return [each + (number < more) for number in range(self.size)]

    def span(self, positions: int) -> slice:
        """This rank's slice of a pack of so many positions."""
        sizes = self.sizes(positions)
        first = sum(sizes[: self.place])
        return slice(first, first + sizes[self.place])

    def to_heads(
        self, query: Tensor, key: Tensor, value: Tensor, positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(1, heads, slice, d) each to (1, heads / size, positions, d).

        Where heads of keys and values are fewer than ranks, or do not divide, they are repeated:
        each rank gets those that its queries look at. Raises ModelError where the queries' heads do
        not divide by the ranks.
        """
        heads, pairs = query.shape[1], key.shape[1]
        if heads % self.size:
            raise ModelError(
                f"a layer has {heads} attention heads, which learner.sequence_parallel {self.size} "
                "does not divide: set it to a divisor of them"
            )
        if copies := self.size // math.gcd(pairs, self.size) - 1:
            key, value = (s.repeat_interleave(copies + 1, 1) for s in (key, value))
        # (rank, position, head, d): what goes to one rank lies together.
        states = [s[0].unflatten(0, (self.size, -1)).transpose(1, 2) for s in (query, key, value)]
        if query.shape[3] != value.shape[3]:
            found = [self._gathered(part, positions) for part in states]
        else:
            whole = self._gathered(torch.cat(states, 2), positions)
            found = list(whole.split([part.shape[2] for part in states], 1))
        query, key, value = (part.transpose(0, 1)[None] for part in found)
        return query, key, value

    def _gathered(self, states: Tensor, positions: int) -> Tensor:
        """(size, slice, heads, d) to (positions, heads, d)."""
        send = [states.shape[1]] * self.size
        return _Exchange.apply(states.flatten(0, 1), send, self.sizes(positions), self._group)

    def to_positions(self, output: Tensor) -> Tensor:
        """(1, positions, heads / size, d) to (1, slice, heads, d)."""
        sizes = self.sizes(output.shape[1])
        own = sizes[self.place]
        parts = _Exchange.apply(output[0], sizes, [own] * self.size, self._group)
        return parts.unflatten(0, (self.size, own)).transpose(0, 1).flatten(1, 2)[None]

    def own_heads(self, values: Tensor) -> Tensor:
        """Of one value a head (heads,) those of this rank's."""
        return values.chunk(self.size)[self.place]

    def added(self, values: Tensor) -> Tensor:
        """The sum over the group of tensors that are zero but for what a rank computed itself. The
        gradient of it comes back to each rank as it is: all compute the same loss."""
        return _Added.apply(values, self._group)

    def common(self, numbers: Iterable[int]) -> set[int]:
        """Those that every rank of the group has."""
        of_ranks: list[set[int]] = [set()] * self.size
        dist.all_gather_object(of_ranks, set(numbers), group=self._group)
        return set.intersection(*of_ranks)


class _Exchange(torch.autograd.Function):
    """The first ``send[0]`` rows to rank 0 of the group, and so on; rows of all ranks in order."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _exchanged(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchanged(
    rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    found = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(found, rows.contiguous(), receive, send, group=group)
    return found


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient, None
