"""The scores of ``TiledHead`` for a model in bfloat16 on a CPU, a block of its vocabulary at a
time.

A CPU multiplies bfloat16 into bfloat16 only, which would round the logits. So a block of the weight
is widened, and its logits are float32 products, as exact as those of a float32 model. What they sum
up to is carried from block to block, and a block stays in the processor's cache. Gradients are
bfloat16 products, each rounded once, as those of the model's layers are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: Rows of the head's weight in a block.
ROWS = 8192
#: Tokens whose logits of a block are held at once.
TOKENS = 512


class BlockedScores(torch.autograd.Function):
    """States (M, H), weight (V, H) and bias to log-probabilities (with gradient) and entropies
    (without) of M tokens, in float32.

    What a block gives to the probabilities is kept for the backward pass while ``kept_bytes`` last;
    that of the other blocks is made again.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: Tensor,
        softcap: float | None,
        kept_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        count = len(states)
        logits_of = _Logits(states, weight, bias, temperature, softcap)
        highest = torch.full((count,), -torch.inf)
        total, mean, own = (torch.zeros(count) for _ in range(3))
        spare = torch.empty(min(TOKENS, count), ROWS)
        room = 0 if softcap is not None else kept_bytes // max(1, weight.itemsize * ROWS * count)
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        for rows in _blocks(weight):
            block, places = weight[rows].float(), _Places(tokens, rows)
            keep = weight.new_empty(count, len(block)) if len(kept) < room else None
            for part in _parts(count):
                logits = logits_of(part, rows, block)
                places.read(logits, part, own)
                before = highest[part]
                now = torch.maximum(before, logits.amax(1))
                shares = torch.exp(logits.sub_(now[:, None]), out=_view(spare, logits.shape))
                # What was summed below a lower highest logit shifts and shrinks.
                shift = torch.where(before.isinf(), 0.0, before - now)
                shrink = (before - now).exp()
                mean[part] = shrink * (mean[part] + shift * total[part])
                mean[part] += torch.bmm(shares[:, None], logits[..., None])[:, 0, 0]
                total[part] = shrink * total[part] + shares.sum(1)
                highest[part] = now
                if keep is not None:
                    keep[part] = shares
            if keep is not None:
                kept[rows.start] = (places.cleared(keep), highest.clone())
        log_total = total.log()
        logprobs, entropy = own - highest - log_total, log_total - mean / total
        norms = highest + log_total
        ctx.save_for_backward(states, weight, bias, tokens, temperature, norms, own, logprobs)
        ctx.softcap, ctx.kept = softcap, kept
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, bias, tokens, temperature, norms, own, logprobs = ctx.saved_tensors
        is_due = ctx.needs_input_grad
        logits_of = _Logits(states, weight, bias, temperature, ctx.softcap)
        scale = gradient.float() / temperature
        # Apart: one minus a likely token's probability would be lost in bfloat16.
        of_own = scale * -torch.expm1(logprobs) * logits_of.bend(own * temperature)
        of_states = torch.zeros_like(states, dtype=torch.float32) if is_due[0] else None
        of_weight = torch.empty_like(weight) if is_due[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if is_due[2] else None
        for rows in _blocks(weight):
            places = _Places(tokens, rows)
            shares, highest = ctx.kept.pop(rows.start, (None, norms))
            if shares is None:
                shares = places.cleared(_shares(logits_of, rows, weight, temperature, norms))
            factor = scale * (highest - norms).exp()
            if of_states is not None:
                of_states.addcmul_(factor[:, None], (shares @ weight[rows]).float(), value=-1)
            if of_bias is not None:
                of_bias[rows] -= factor @ shares.float()
            if of_weight is not None:
                scaled = (factor[:, None] * states).to(weight.dtype)
                of_weight[rows] = places.added(-(shares.t() @ scaled).float(), of_own, states)
        if of_states is not None:
            of_states.addcmul_(of_own[:, None], weight[tokens].float())
        if of_bias is not None:
            of_bias.index_add_(0, tokens, of_own)
        return (
            None if of_states is None else of_states.to(states.dtype),
            of_weight,
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


class _Logits:
    """Logits of some tokens over some rows of the weight, divided by the temperature."""

    def __init__(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: Tensor,
        softcap: float | None,
    ) -> None:
        self._states = states.float()
        self._bias, self._softcap = bias, softcap
        self._temperature = None if bool((temperature == 1).all()) else temperature[:, None]
        self._is_exact = states.dtype == weight.dtype == torch.bfloat16
        self._room = torch.empty(min(TOKENS, len(states)), ROWS)

    def __call__(self, part: slice, rows: slice, block: Tensor) -> Tensor:
        """(part, rows) float32, valid until the next call. ``block`` has the rows, widened."""
        states = self._states[part]
        logits = _view(self._room, (len(states), len(block)))
        with _onednn() if self._is_exact else nullcontext():
            torch.mm(states, block.t(), out=logits)
        if self._bias is not None:
            logits += self._bias[rows]
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        if self._temperature is not None:
            logits.div_(self._temperature[part])
        return logits

    def bend(self, logits: Tensor) -> Tensor | float:
        """How much the cap lets a logit change, by what it has made of it."""
        return 1.0 if self._softcap is None else 1 - (logits / self._softcap).square_()


class _Places:
    """Where the tokens themselves are among some rows of the weight."""

    def __init__(self, tokens: Tensor, rows: slice) -> None:
        self._row = tokens - rows.start
        self._is_here = (self._row >= 0) & (tokens < rows.stop)
        self._who = self._is_here.nonzero()[:, 0]

    def read(self, logits: Tensor, part: slice, own: Tensor) -> None:
        """Note the tokens' own logits, of those in ``part``."""
        row = self._row[part].clamp(0, logits.shape[1] - 1)
        found = logits.gather(1, row[:, None])[:, 0]
        own[part] = torch.where(self._is_here[part], found, own[part])

    def cleared(self, shares: Tensor) -> Tensor:
        """``shares`` (M, rows), in place, with 0 for the tokens themselves."""
        shares[self._who, self._row[self._who]] = 0
        return shares

    def added(self, of_rows: Tensor, of_own: Tensor, states: Tensor) -> Tensor:
        """``of_rows`` (rows, H), in place, with what the tokens themselves add to it."""
        return of_rows.index_add_(
            0, self._row[self._who], of_own[self._who, None] * states[self._who]
        )


def _shares(
    logits_of: _Logits, rows: slice, weight: Tensor, temperature: Tensor, norms: Tensor
) -> Tensor:
    """(M, rows) probabilities, each times what the cap makes of a change of its logit."""
    shares = weight.new_empty(len(norms), rows.stop - rows.start)
    block = weight[rows].float()
    for part in _parts(len(norms)):
        logits = logits_of(part, rows, block)
        bend = logits_of.bend(logits * temperature[part, None])
        shares[part] = logits.sub_(norms[part, None]).exp_().mul_(bend)
    return shares


@contextmanager
def _onednn() -> Iterator[None]:
    """Float32 products by oneDNN: on some processors twice as fast as MKL (docs/benchmarks.md).

    It may round factors to bfloat16, never sums: exact where the factors are bfloat16 numbers.
    """
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _blocks(weight: Tensor) -> Iterator[slice]:
    for start in range(0, len(weight), ROWS):
        yield slice(start, min(start + ROWS, len(weight)))


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, TOKENS):
        yield slice(start, start + TOKENS)


def _view(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first numbers of ``room``, in ``shape``."""
    return room.view(-1)[: math.prod(shape)].view(shape)
