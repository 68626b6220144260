"""Temporal advantage shaping: the weight of each completion token by its position (docs/method.md
1.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.learner.config import TasNormalize, TasShape


def tas_weights(
    completions: Tensor,
    shape: TasShape = "parabolic",
    lam: float = 0.3,
    normalize: TasNormalize = "none",
    *,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights (B, T) of left-aligned completions, 0 where padded (docs/method.md 1.2).

    ``completions`` is either the lengths (B,) in tokens, with T = ``width`` or the longest of them,
    or a left-aligned mask (B, T) of 0 and 1. Position is u = t/(L-1) with L the tokens of that
    sequence, so padding never moves it; a single token sits at u = 0. ``unit_mean`` makes the
    weights of each sequence average 1. Raises ConfigError for a bad shape or strength, DataError
    for an empty completion or a mask with holes."""
    if not (math.isfinite(lam) and lam >= 0):
        raise ConfigError(f"tas_lambda is {lam}: it must be a finite number >= 0")
    lengths, width = _lengths(completions, width)
    index = torch.arange(width, device=completions.device)
    last = (lengths - 1).clamp(min=1).to(dtype)
    u = index.to(dtype) / last[:, None]  # (B, T)
    weights = torch.where(index < lengths[:, None], 1 + lam * _profile(u, shape), 0.0)
    if normalize == "unit_mean":
        return weights * (lengths.to(dtype) / weights.sum(1))[:, None]
    if normalize != "none":
        raise ConfigError(f"tas_normalize {normalize!r} is unknown: use none or unit_mean")
    return weights


def _profile(u: Tensor, shape: TasShape) -> Tensor:
    """The part of the weight that lambda multiplies, in [0, 1] for u in [0, 1]."""
    match shape:
        case "parabolic":
            return (2 * u - 1) ** 2
        case "uniform":
            return torch.zeros_like(u)
        case "linear_decay":
            return 1 - u
        case "linear_incline":
            return u
        case "inverse_parabolic":
            return 1 - (2 * u - 1) ** 2
        case _:
            raise ConfigError(
                f"tas_shape {shape!r} is unknown: use one of parabolic, uniform, linear_decay, "
                "linear_incline, inverse_parabolic"
            )


def _lengths(completions: Tensor, width: int | None) -> tuple[Tensor, int]:
    """Lengths (B,) and the padded width T, checked."""
    if completions.dim() == 2:
        lengths = completions.sum(1).long()
        size = completions.shape[1]
        if width not in (None, size):
            raise DataError(
                f"tas_weights got width {width} with a mask {size} wide: leave width out"
            )
        expected = torch.arange(size, device=completions.device) < lengths[:, None]
        if not torch.equal(expected, completions.bool()):
            raise DataError(
                "completion mask is not left-aligned: completion tokens must precede the padding"
            )
    elif completions.dim() == 1:
        lengths = completions.long()
        longest = int(lengths.max()) if len(lengths) else 0
        size = longest if width is None else width
        if size < longest:
            raise DataError(f"a completion of {longest} tokens does not fit a width of {size}")
    else:
        raise DataError(
            f"tas_weights takes lengths (B,) or a mask (B, T), got shape {tuple(completions.shape)}"
        )
    if (lengths < 1).any():
        empty = (lengths < 1).nonzero().flatten().tolist()
        raise DataError(f"completions {empty} have no token: drop them before the loss is computed")
    return lengths, size
