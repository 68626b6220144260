"""Log-probabilities and entropies of completion tokens, a tile of tokens at a time.

The logits of a 152k vocabulary are 608 kB a token in float32, and plain autograd keeps several
copies of them. Here a tile's logits are made, used and dropped. The backward pass makes them again.
They are float32 also where the model is bfloat16 (float64 in a float64 model)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avatar_rl.learner.model.head_on_cpu import BlockedScores

#: Tokens whose logits are held at once: 311 MB of a 152k vocabulary in float32.
TILE = 512
#: Bytes of probabilities that are kept for the backward pass instead of being made again. Small
#: vocabularies fit whole. The backward pass comes next, so this does not add to its peak.
KEPT = 256 << 20


class TiledHead(nn.Module):
    """A plain linear head, its parameters under their own names. One call scores all tokens, so
    ranks under ZeRO 3 gather its weight equally often."""

    weight: Tensor  # (V, H), a parameter

    def __init__(self, head: nn.Linear, softcap: float | None) -> None:
        super().__init__()
        self.weight, self.softcap = head.weight, softcap
        self.register_parameter("bias", head.bias)

    def forward(self, states: Tensor, tokens: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) log-probabilities of ``tokens`` and entropies, from the states (M, H) that predict
        them."""
        kept = KEPT if torch.is_grad_enabled() else 0
        is_short = self.weight.dtype != _wide(states.dtype)
        scores = BlockedScores if is_short and not states.is_cuda else _Tiles
        return scores.apply(states, self.weight, self.bias, tokens, temperature, self.softcap, kept)


def chunked_scores(
    head: nn.Module,
    softcap: float | None,
    states: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    chunks: int,
) -> tuple[Tensor, Tensor]:
    """As ``TiledHead.forward`` for any other head (an adapter over a linear one, say), which is
    called as it is, in chunks that are recomputed.

    Some chunks may be empty. The head runs all the same: under ZeRO 3 other ranks, told the same
    number of ``chunks``, gather its weights at the same time.
    """

    def scores(states: Tensor, tokens: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states)
        logits = logits.to(_wide(logits.dtype))
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logprobs = torch.log_softmax(logits / temperature[:, None], -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, tokens[:, None])[:, 0], entropy

    pieces = [
        checkpoint(scores, *part, use_reentrant=False)
        for part in zip(
            *(whole.tensor_split(chunks) for whole in (states, tokens, temperature)), strict=True
        )
    ]
    logprobs, entropy = (torch.cat(part) for part in zip(*pieces, strict=True))
    return logprobs, entropy


def tiles(tokens: int) -> int:
    """Tiles that so many tokens take, at least one."""
    return max(1, -(-tokens // TILE))


class _Tiles(torch.autograd.Function):
    """States, weight and bias to log-probabilities (with gradient) and entropies (without)."""

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
        wide = _wide(states.dtype)
        count, vocabulary = len(states), len(weight)
        logprobs, entropy, norms = (
            torch.empty(count, dtype=wide, device=states.device) for _ in range(3)
        )
        room = kept_bytes // (wide.itemsize * TILE * vocabulary)
        kept: dict[int, Tensor] = {}
        for start in range(0, count, TILE):
            part = slice(start, start + TILE)
            logits = _logits(states[part], weight, bias, softcap).div_(temperature[part, None])
            highest = logits.amax(1, keepdim=True)
            logits -= highest
            weights = logits.exp()
            total = weights.sum(1)
            log_total = total.log()
            own = logits.gather(1, tokens[part, None])[:, 0]
            logprobs[part] = own - log_total
            mean = torch.bmm(weights[:, None], logits[..., None])[:, 0, 0] / total
            entropy[part] = log_total - mean
            norms[part] = highest[:, 0] + log_total
            if softcap is None and len(kept) < room:
                kept[start] = weights.div_(total[:, None])
        ctx.save_for_backward(states, weight, bias, tokens, temperature, norms)
        ctx.softcap, ctx.kept = softcap, kept
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, bias, tokens, temperature, norms = ctx.saved_tensors
        wide, softcap = norms.dtype, ctx.softcap
        is_due = ctx.needs_input_grad
        of_states = torch.empty_like(states) if is_due[0] else None
        # Sums over tiles are wide: rounding each tile to bfloat16 would lose small ones.
        of_weight, of_bias = (
            torch.zeros_like(parameter, dtype=wide) if due else None
            for parameter, due in ((weight, is_due[1]), (bias, is_due[2]))
        )
        for start in range(0, len(states), TILE):
            part = slice(start, start + TILE)
            scale = (gradient[part].to(wide) / temperature[part])[:, None]
            probabilities = ctx.kept.pop(start, None)
            bend = None
            if probabilities is None:
                logits = _logits(states[part], weight, bias, softcap)
                if softcap is not None:
                    bend = 1 - (logits / softcap).square_()
                probabilities = logits.div_(temperature[part, None]).sub_(norms[part, None]).exp_()
            of_logits = probabilities.mul_(-scale)
            of_logits.scatter_add_(1, tokens[part, None], scale)
            if bend is not None:
                of_logits *= bend
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            _products(of_logits, states[part], weight, of_states, of_weight, part)
        return (
            of_states,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """(tile, V) as the model's own head gives them, never rounded to a shorter type."""
    wide = _wide(states.dtype)
    if states.dtype == weight.dtype == wide:
        logits = F.linear(states, weight)
    else:
        logits = torch.mm(states.to(weight.dtype), weight.t(), out_dtype=wide)
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _products(
    of_logits: Tensor,
    states: Tensor,
    weight: Tensor,
    of_states: Tensor | None,
    of_weight: Tensor | None,
    part: slice,
) -> None:
    """Write the gradient of a tile's states and add to that of the weight."""
    wide = of_logits.dtype
    if weight.dtype != wide:
        short = of_logits.to(weight.dtype)
        if of_states is not None:
            of_states[part] = torch.mm(short, weight, out_dtype=wide)
        if of_weight is not None:
            of_weight += torch.mm(short.t(), states.to(weight.dtype), out_dtype=wide)
        return
    states = states.to(wide)
    if of_weight is not None:
        of_weight.addmm_(of_logits.t(), states)
    if of_states is not None:
        torch.mm(of_logits, weight, out=of_states[part])
