"""Advantages of fresh and replayed completions (docs/method.md 1.1). Rewards are those of the whole
step, over all ranks.

N completions, P mixed groups. A reward that every component of which was masked is NaN (None in a
trajectory): such a completion takes no part in any mean or deviation and its advantage is 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.learner.config import FreshAdvantage, ReplayAdvantage, ReplaySign, RewardScale

#: Added to the deviation of fresh rewards, as in GRPO.
EPSILON = 1e-4
#: Smallest deviation that replayed advantages are divided by (docs/method.md 1.1).
SIGMA_FLOOR = 0.1


class Advantages(NamedTuple):
    """Advantages of a step and what health metrics need to know of its groups."""

    values: Tensor  # (N,), 0 where the reward is masked
    scored: Tensor  # (N,) bool, False where the reward is masked
    dead_before: (
        Tensor  # (P,) bool: the group's fresh rewards are all alike, so alone it teaches nothing
    )
    dead_after: Tensor  # (P,) bool: every advantage of the mixed group is 0


def rewards_tensor(rewards: Sequence[float | None], dtype: torch.dtype = torch.float64) -> Tensor:
    """Rewards (N,), NaN for None. Raises DataError for an infinite one."""
    values = torch.tensor(
        [float("nan") if reward is None else reward for reward in rewards], dtype=dtype
    )
    _reject_infinite(values)
    return values


def step_advantages(
    rewards: Tensor,
    groups: Tensor,
    is_replay: Tensor,
    baselines: Tensor | None = None,
    same_prompt: Tensor | None = None,
    *,
    scale_rewards: RewardScale = "group",
    replay_advantage: ReplayAdvantage = "vcrs",
    fresh_advantage: FreshAdvantage = "group",
    replay_sign: ReplaySign = "both",
) -> Advantages:
    """Advantages of all N completions of a step.

    ``rewards`` (N,) NaN = masked; ``groups`` (N,) int64, the mixed group a completion is trained
    in; ``is_replay`` (N,) bool; ``baselines`` (N,) Rbar of the prompt, read for replayed rows
    (needed unless batch_mean); ``same_prompt`` (N,) bool, whether a replayed row answers the prompt
    of its group (needed by joint). ``joint`` normalises the fresh rows of a group with the replayed
    ones of the same prompt; other replays, and those of a group without a scored fresh row, keep
    VCRS. ``fresh_advantage`` vcrs gives every row VCRS, sigma being the deviation of all rewards of
    the step. ``replay_sign`` positive sets negative advantages of replays to 0. Raises DataError
    for shapes that disagree, infinite rewards and missing baselines."""
    for name, tensor in (("groups", groups), ("is_replay", is_replay), ("baselines", baselines)):
        if tensor is not None and tensor.shape != rewards.shape:
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)}, rewards {tuple(rewards.shape)}: one each"
            )
    is_replay = is_replay.bool()
    scored = ~rewards.isnan()
    if fresh_advantage == "vcrs":
        values = replay_advantages(rewards, _baselines(baselines, torch.ones_like(is_replay)))
        return _finish(values, rewards, groups, is_replay, replay_sign)
    joint = ~is_replay
    if replay_advantage == "joint":
        if same_prompt is None:
            raise DataError(
                "replay_advantage: joint needs same_prompt, which replays answer their group's "
                "prompt"
            )
        hosted = torch.isin(groups, groups[~is_replay & scored])
        joint = joint | (same_prompt.bool() & hosted)
    values = torch.zeros_like(rewards)
    values[joint] = group_advantages(rewards[joint], groups[joint], scale_rewards)
    if is_replay.any():
        by_baseline = replay_advantages(
            rewards[is_replay],
            None if replay_advantage == "batch_mean" else _baselines(baselines, is_replay),
        )
        values[is_replay] = torch.where(joint[is_replay], values[is_replay], by_baseline)
    return _finish(values, rewards, groups, is_replay, replay_sign)


def _finish(
    values: Tensor, rewards: Tensor, groups: Tensor, is_replay: Tensor, replay_sign: ReplaySign
) -> Advantages:
    if replay_sign == "positive":
        values = torch.where(is_replay, values.clamp(min=0), values)
    scored = ~rewards.isnan()
    names, index = torch.unique(groups, return_inverse=True)
    spread = _spread(rewards, index, len(names), ~is_replay & scored)
    alive = torch.zeros(len(names), dtype=torch.bool, device=rewards.device)
    alive[index[values.abs() > 1e-8]] = True
    return Advantages(values, scored, dead_before=~(spread > 0), dead_after=~alive)


def group_advantages(
    rewards: Tensor, groups: Tensor, scale_rewards: RewardScale = "group"
) -> Tensor:
    """(N,) ``(R - mean of the group) / (deviation + 1e-4)``, deviation with n - 1 (docs/method.md
    1.1; Bessel as TRL has it).

    ``batch`` divides by the deviation of all rewards, ``none`` by nothing. A group with one scored
    member, or whose rewards are all alike, gets exactly 0. Groups may differ in size."""
    _reject_infinite(rewards)
    if scale_rewards not in ("group", "batch", "none"):
        raise ConfigError(f"scale_rewards {scale_rewards!r} is unknown: use group, batch or none")
    scored = ~rewards.isnan()
    names, index = torch.unique(groups, return_inverse=True)
    count = _sum(scored.to(rewards.dtype), index, len(names))
    mean = _sum(torch.where(scored, rewards, 0), index, len(names)) / count.clamp(min=1)
    centred = torch.where(scored, rewards - mean[index], 0)
    if scale_rewards == "group":
        deviation = (_sum(centred**2, index, len(names)) / (count - 1).clamp(min=1)).sqrt()[index]
    elif scale_rewards == "batch":
        deviation = _deviation(rewards[scored])
    else:
        deviation = torch.ones_like(rewards) - EPSILON
    # Exactly 0, not the rounding error of the mean, where nothing is to be learnt.
    alive = _spread(rewards, index, len(names), scored)[index] > 0
    return torch.where(alive, centred / (deviation + EPSILON), 0)


def replay_advantages(rewards: Tensor, baselines: Tensor | None) -> Tensor:
    """(N,) VCRS ``(R - Rbar) / sigma`` of the replayed rewards of the whole step (docs/method.md
    1.1).

    sigma is their deviation (n - 1), at least 0.1, and 1 when all are alike. ``baselines`` (N,) is
    Rbar of each prompt; None takes the mean of the replayed batch (the ablation). Raises DataError
    for a baseline that is not finite."""
    _reject_infinite(rewards)
    scored = ~rewards.isnan()
    kept = rewards[scored]
    if not len(kept):
        return torch.zeros_like(rewards)
    alike = bool(kept.max() == kept.min())
    if baselines is None:
        if alike:
            return torch.zeros_like(rewards)
        baselines = kept.mean().expand_as(rewards)
    elif not baselines[scored].isfinite().all():
        rows = (scored & ~baselines.isfinite()).nonzero().flatten().tolist()
        raise DataError(
            f"replayed rows {rows} have no finite baseline: use the mean over all prompts for "
            "unseen ones"
        )
    sigma = rewards.new_ones(()) if alike else _deviation(kept).clamp(min=SIGMA_FLOOR)
    return torch.where(scored, (rewards - baselines) / sigma, 0)


def _baselines(baselines: Tensor | None, is_replay: Tensor) -> Tensor:
    if baselines is None:
        raise DataError(
            "replayed completions need the baseline of their prompt: pass baselines, or use "
            "batch_mean"
        )
    return baselines[is_replay]


def _reject_infinite(rewards: Tensor) -> None:
    if rewards.isinf().any():
        rows = rewards.isinf().nonzero().flatten().tolist()
        raise DataError(
            f"rewards of rows {rows} are infinite: a reward must be finite, or masked (None, NaN)"
        )


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation with n - 1; 0 for fewer than two values."""
    return values.std(correction=1) if len(values) > 1 else values.new_zeros(())


def _sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_add(0, index, values)


def _spread(values: Tensor, index: Tensor, size: int, include: Tensor) -> Tensor:
    """(P,) largest minus smallest included value of each group; at most 0 where there are fewer
    than two."""
    kept, where = values[include], index[include]
    high = values.new_full((size,), -torch.inf).scatter_reduce(0, where, kept, "amax")
    low = values.new_full((size,), torch.inf).scatter_reduce(0, where, kept, "amin")
    return high - low
