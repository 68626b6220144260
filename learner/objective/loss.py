"""The policy loss of a micro-batch: clipped surrogate of fresh and replayed completions, and KL
(docs/method.md 1.1, 2.3, 3).

B completions, T tokens. ``policy_loss`` returns the *sum* that a micro-batch contributes to the
loss of its step; the denominators come from the whole step (`StepTotals`), so the split into
micro-batches and ranks never matters. Add the contributions up, over ranks too: where the engine
averages gradients over W ranks, scale the loss by W first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.learner.config import ObjectiveConfig

#: Log-ratios are held within +-20 so that exp() stays finite in float32; past it ratio and KL stay
#: constant.
LOG_LIMIT = 20.0


@dataclass(frozen=True)
class StepTotals:
    """Denominators of one optimiser step, over all micro-batches and ranks."""

    fresh_sequences: int
    replay_sequences: int
    fresh_tokens: (
        int  # tokens that the loss sees: without truncated completions when those are masked
    )
    replay_tokens: int
    max_completion_tokens: int | None = (
        None  # longest completion that may be sampled; dr_grpo divides by it
    )

    @classmethod
    def count(
        cls,
        lengths: Tensor,
        is_replay: Tensor,
        config: ObjectiveConfig,
        *,
        truncated: Tensor | None = None,
        max_completion_tokens: int | None = None,
    ) -> StepTotals:
        """Count a whole step: ``lengths`` (N,) in tokens, ``is_replay`` and ``truncated`` (N,)
        bool."""
        replayed = is_replay.bool()
        tokens = lengths.long()
        if config.mask_truncated_completions:
            tokens = tokens * ~_truncated(truncated)
        return cls(
            fresh_sequences=int((~replayed).sum()),
            replay_sequences=int(replayed.sum()),
            fresh_tokens=int(tokens[~replayed].sum()),
            replay_tokens=int(tokens[replayed].sum()),
            max_completion_tokens=max_completion_tokens,
        )

    def __add__(self, other: StepTotals) -> StepTotals:
        """Totals of two parts of one step."""
        if self.max_completion_tokens != other.max_completion_tokens:
            raise ConfigError(
                "parts of one step disagree about max_completion_tokens: use one sampling config"
            )
        return StepTotals(
            self.fresh_sequences + other.fresh_sequences,
            self.replay_sequences + other.replay_sequences,
            self.fresh_tokens + other.fresh_tokens,
            self.replay_tokens + other.replay_tokens,
            self.max_completion_tokens,
        )


class TokenDiagnostics(NamedTuple):
    """What the loss saw of each token, without gradient; read where ``mask``. Feeds
    `avatar_rl.learner.objective.step_metrics`."""

    mask: Tensor  # (B, T) bool, tokens in the loss
    is_replay: Tensor  # (B,) bool
    ratio: Tensor  # (B, T) ratio of the surrogate, before clipping
    weight: Tensor  # (B, T) mismatch weight, 1 when not corrected
    rejected: Tensor  # (B,) bool, trainer and sampler differ too much: weight 0
    mismatch_kl: Tensor | None  # (B, T) k3 of old and behaviour; None without an old of its own
    clipped: Tensor  # (B, T) bool, no gradient because of a clip (cispo: weight was capped)
    loss: Tensor  # (B, T) surrogate loss with TAS and mismatch weight, before alpha and averaging
    kl_behaviour: Tensor  # (B, T) k3 to the behaviour policy
    kl_reference: Tensor | None  # (B, T) k3 to the reference policy


class LossOutput(NamedTuple):
    """Contribution of a micro-batch to the step's loss; ``loss = policy + kl``."""

    loss: Tensor  # () with gradient
    policy: Tensor  # () surrogate part, detached
    kl: Tensor  # () beta times the mean k3, detached
    rows: Tensor  # (B,) contribution of each completion, detached: a NaN here names the culprit
    tokens: TokenDiagnostics


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    tas: Tensor,
    is_replay: Tensor,
    reference_logprobs: Tensor | None,
    config: ObjectiveConfig,
    *,
    totals: StepTotals,
    old_logprobs: Tensor | None = None,
    truncated: Tensor | None = None,
) -> LossOutput:
    """Loss contribution of B completions (docs/method.md 1.1): ``-(J_on + alpha * J_off) + beta *
    KL``.

    ``logprobs`` (B, T) of the current policy, with gradient; ``behaviour_logprobs`` (B, T) as
    stored with the trajectory; ``mask`` (B, T) 1 = completion token; ``advantages`` (B,); ``tas``
    (B, T); ``is_replay`` (B,) bool; ``reference_logprobs`` (B, T), needed when beta > 0 (with beta
    = 0 it is only measured). ``old_logprobs`` (B, T) is the trainer's own score of the completions:
    then the ratio of fresh rows is taken against it, and ``config.mismatch`` weighs each of their
    tokens by old / behaviour. Replayed rows keep their ratio over the behaviour policy, unless
    ``config.old_logprobs`` is current. ``truncated`` (B,) bool is needed by
    mask_truncated_completions. Padding may hold
    anything. J_on and J_off are averaged over their own sequences or tokens, KL over all;
    logarithms are natural. A NaN that a model computed (``logprobs``, ``old_logprobs``, the
    reference where beta > 0) passes on to the loss and shows in ``rows``. Raises DataError for
    shapes that disagree, an empty completion, other NaN inputs, totals too small; ConfigError when
    an input that an option needs is missing."""
    keep, replay = mask.bool(), is_replay.bool()
    _check(
        logprobs,
        keep,
        replay,
        totals,
        {
            "advantages": advantages,
            "tas": tas,
            "behaviour": behaviour_logprobs,
            "reference": reference_logprobs,
            "old": old_logprobs,
        },
    )
    _check_options(config, totals, reference_logprobs, old_logprobs)
    if config.mask_truncated_completions:
        keep = keep & ~_truncated(truncated)[:, None]
    current = torch.where(keep, logprobs, 0)
    behaviour = torch.where(keep, behaviour_logprobs, 0)
    old = _old(behaviour, old_logprobs, keep, replay, config)
    lengths = keep.sum(1, keepdim=True).clamp(min=1)  # (B, 1)

    ratio = _ratio(current, old, lengths, config)
    rejected = _rejected(old - behaviour, lengths, config)
    weight = _mismatch_weight(old - behaviour, config).masked_fill(rejected, 0)
    shaped = torch.where(keep, tas * advantages[:, None], 0).to(logprobs.dtype)
    surrogate, clipped = _surrogate(ratio, shaped, current, config)
    surrogate = -surrogate * weight

    policy_scale, kl_scale = _scales(lengths, replay, config, totals, logprobs.dtype)
    policy_rows = (policy_scale * torch.where(keep, surrogate, 0)).sum(1)
    kl = None if reference_logprobs is None else _k3(current, _computed(reference_logprobs, keep))
    kl_rows = torch.zeros_like(policy_rows)
    if kl is not None and config.beta > 0:
        kl_rows = config.beta * (kl_scale * torch.where(keep, kl, 0)).sum(1)
    tokens = TokenDiagnostics(
        mask=keep,
        is_replay=replay,
        ratio=ratio.detach(),
        weight=weight,
        rejected=rejected.squeeze(1),
        mismatch_kl=None if old_logprobs is None else _k3(behaviour, old),
        clipped=clipped & keep,
        loss=surrogate.detach(),
        kl_behaviour=_k3(current.detach(), behaviour),
        kl_reference=None if kl is None else kl.detach(),
    )
    rows = policy_rows + kl_rows
    return LossOutput(
        rows.sum(), policy_rows.sum().detach(), kl_rows.sum().detach(), rows.detach(), tokens
    )


def _computed(logprobs: Tensor, keep: Tensor) -> Tensor:
    """Log-probabilities that a model has just computed, 0 where padded; NaN for infinite, which
    clamps would hide."""
    return torch.where(keep, logprobs.masked_fill(~logprobs.isfinite(), torch.nan), 0)


def _old(
    behaviour: Tensor,
    old_logprobs: Tensor | None,
    keep: Tensor,
    replay: Tensor,
    config: ObjectiveConfig,
) -> Tensor:
    """(B, T) what the ratio is taken against: the behaviour policy where the trainer has no ``old``
    of its own (docs/method.md 1.1)."""
    if old_logprobs is None:
        return behaviour
    of_trainer = keep if config.old_logprobs == "current" else keep & ~replay[:, None]
    return torch.where(of_trainer, _computed(old_logprobs.detach(), of_trainer), behaviour)


def _ratio(current: Tensor, old: Tensor, lengths: Tensor, config: ObjectiveConfig) -> Tensor:
    """(B, T) importance ratio current / old."""
    log_ratio = (current - old).clamp(-LOG_LIMIT, LOG_LIMIT)
    if config.ratio == "token":
        return log_ratio.exp()
    mean = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)  # padding is 0
    if config.ratio == "sequence_plain":
        return mean.exp()
    # GSPO-token (docs/method.md 2.3): the sequence's value, each token's own gradient.
    return mean.detach().exp() * (current - current.detach()).exp()


def _mismatch_weight(log_weight: Tensor, config: ObjectiveConfig) -> Tensor:
    """(B, T) weight trainer / sampler of a log-difference that is 0 where padded; no gradient."""
    if config.mismatch == "none":
        return torch.ones_like(log_weight)
    if config.mismatch in ("sequence_truncate", "sequence_mask"):
        log_weight = log_weight.sum(1, keepdim=True).expand_as(log_weight)
    weight = log_weight.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    floor = 0.0 if config.mismatch_floor is None else config.mismatch_floor
    if config.mismatch in ("token_truncate", "sequence_truncate"):
        return weight.clamp(floor, config.mismatch_cap)
    return torch.where((weight >= floor) & (weight <= config.mismatch_cap), weight, 0)


def _rejected(log_weight: Tensor, lengths: Tensor, config: ObjectiveConfig) -> Tensor:
    """(B, 1) bool, completions whose log-difference of trainer and sampler, 0 where padded, is too
    large on average. A NaN is not rejected: its micro-batch is left out with its name."""
    log_weight = log_weight.clamp(-LOG_LIMIT, LOG_LIMIT)
    if config.rejection == "k3":
        gap, bound = log_weight.expm1() - log_weight, config.rejects_above
    else:
        gap, bound = log_weight, math.log(config.rejects_above)
    return (gap.sum(1, keepdim=True) / lengths).abs() > bound


def _surrogate(
    ratio: Tensor, shaped: Tensor, current: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """(B, T) surrogate to maximise and where a clip took its gradient; ``shaped`` is TAS weight x
    advantage."""
    low, high = 1 - config.epsilon, 1 + config.upper
    if config.loss_type == "cispo":
        return ratio.clamp(max=high).detach() * shaped * current, (ratio > high) & (shaped != 0)
    clipped = ((ratio < low) & (shaped < 0)) | ((ratio > high) & (shaped > 0))
    bounded = ratio
    if config.delta is not None:
        bounded = ratio.clamp(max=config.delta)
        clipped = clipped | ((ratio > config.delta) & (shaped < 0))
    # Not `clipped` itself: min() is what the papers write, and it settles ties as they do.
    return torch.min(bounded * shaped, ratio.clamp(low, high) * shaped), clipped


def _k3(current: Tensor, other: Tensor) -> Tensor:
    """(B, T) ``exp(other - current) - (other - current) - 1`` >= 0 (docs/method.md 1.1)."""
    difference = (other - current).clamp(-LOG_LIMIT, LOG_LIMIT)
    return difference.expm1() - difference


def _scales(
    lengths: Tensor, replay: Tensor, config: ObjectiveConfig, totals: StepTotals, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(B, 1) factors of a completion's tokens in the surrogate and in the KL."""
    fresh, stored = totals.fresh_sequences, totals.replay_sequences
    per_row: Tensor | float = 1.0
    if config.loss_type == "grpo":
        per_row = lengths.to(dtype)
    elif config.loss_type == "dr_grpo":
        if totals.max_completion_tokens is None:
            raise ConfigError(
                "loss_type: dr_grpo divides by the longest completion: set max_completion_tokens"
            )
        per_row = float(totals.max_completion_tokens)
    else:  # dapo, bnpo, cispo
        fresh, stored = totals.fresh_tokens, totals.replay_tokens
    # A kind without tokens in the step contributes 0, whatever it is divided by.
    on, off, both = (1 / max(count, 1) for count in (fresh, stored, fresh + stored))
    # torch.where of two Python numbers would round to float32.
    kind = torch.full(replay.shape, on, dtype=dtype, device=replay.device)
    kind = kind.masked_fill(replay, config.alpha * off)[:, None]
    return kind / per_row, torch.full_like(kind, both) / per_row


def _truncated(truncated: Tensor | None) -> Tensor:
    if truncated is None:
        raise ConfigError(
            "mask_truncated_completions needs to know which completions were cut: pass truncated"
        )
    return truncated.bool()


def _check_options(
    config: ObjectiveConfig,
    totals: StepTotals,
    reference_logprobs: Tensor | None,
    old_logprobs: Tensor | None,
) -> None:
    if config.beta > 0 and reference_logprobs is None:
        raise ConfigError(
            f"beta is {config.beta} but there are no reference log-probabilities: pass them, or "
            "set 0"
        )
    needs = "rejection" if config.rejection != "none" else "old_logprobs"
    if old_logprobs is None and (
        config.old_logprobs in ("trainer", "current") or needs == "rejection"
    ):
        raise ConfigError(
            f"{needs}: {getattr(config, needs)} needs the trainer's own old_logprobs: pass them"
        )
    if totals.fresh_sequences + totals.replay_sequences < 1:
        raise DataError("the step has no completion: count StepTotals over the whole step")


def _check(
    logprobs: Tensor,
    keep: Tensor,
    replay: Tensor,
    totals: StepTotals,
    inputs: dict[str, Tensor | None],
) -> None:
    """Shapes, empty completions, values that are not finite, totals of another step."""
    if logprobs.dim() != 2 or keep.shape != logprobs.shape:
        raise DataError(
            f"logprobs {tuple(logprobs.shape)} and mask {tuple(keep.shape)} must both be (B, T)"
        )
    for name, tensor in (*inputs.items(), ("is_replay", replay)):
        if tensor is None:
            continue
        if tensor.shape != (
            logprobs.shape[:1] if name in ("advantages", "is_replay") else logprobs.shape
        ):
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)} beside logprobs {tuple(logprobs.shape)}"
            )
        if name in ("reference", "old"):
            continue  # a model's NaN costs its micro-batch, not the run
        bad = ~tensor.isfinite() if tensor.dim() == 1 else (~tensor.isfinite() & keep).any(1)
        if bad.any():
            raise DataError(
                f"{name} of rows {bad.nonzero().flatten().tolist()} is NaN or infinite: drop "
                "these rows"
            )
    empty = ~keep.any(1)
    if empty.any():
        raise DataError(
            f"completions {empty.nonzero().flatten().tolist()} have no token: drop them before "
            "the loss"
        )
    stored = int(replay.sum())
    if len(replay) - stored > totals.fresh_sequences or stored > totals.replay_sequences:
        raise DataError(
            f"micro-batch of {len(replay) - stored} fresh and {stored} replayed completions does "
            "not fit a step of "
            f"{totals.fresh_sequences} and {totals.replay_sequences}: count StepTotals over the "
            "whole step"
        )
