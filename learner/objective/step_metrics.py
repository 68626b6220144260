"""Health of a step: sums and maxima of what the loss saw, mergeable over micro-batches and
ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.buffer_service.records.trajectory import Trajectory
from avatar_rl.common.errors import DataError
from avatar_rl.learner.objective.advantages import Advantages
from avatar_rl.learner.objective.loss import LossOutput, TokenDiagnostics

Kind = Literal["fresh", "replay"]
KINDS: tuple[Kind, Kind] = ("fresh", "replay")
#: Bins of a token's normalised position u = t/(L-1).
POSITION_BINS = 20
#: Edges of the advantage histogram; the first and last bin take what lies outside.
ADVANTAGE_EDGES: NDArray[np.float64] = np.linspace(-4.0, 4.0, 42)

#: Nats at which `kl/behaviour_capped` holds a token's k3: one of an old replay may reach thousands
#: and hide the others.
KL_CAP = 1.0

#: Token sums, in the order of `_KindSums.sums`.
_TOKENS, _RATIO, _WEIGHT, _WEIGHT2, _CLIPPED, _KL_BEHAVIOUR = range(6)
_KL_REFERENCE, _REFERENCED, _ENTROPY, _ENTROPIES, _KL_CAPPED = range(6, 11)


@dataclass
class _KindSums:
    """Sums over the tokens of one kind of completion."""

    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(11))
    ratio_max: float = -np.inf
    position_loss: NDArray[np.float64] = field(default_factory=lambda: np.zeros(POSITION_BINS))
    position_count: NDArray[np.float64] = field(default_factory=lambda: np.zeros(POSITION_BINS))
    advantages: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(len(ADVANTAGE_EDGES) - 1)
    )

    def merge(self, other: _KindSums) -> None:
        self.sums += other.sums
        self.ratio_max = max(self.ratio_max, other.ratio_max)
        self.position_loss += other.position_loss
        self.position_count += other.position_count
        self.advantages += other.advantages

    def mean(self, total: int, count: int = _TOKENS) -> float:
        return float(self.sums[total] / self.sums[count])


class StepMetrics:
    """Collects one step. ``add`` every micro-batch where it is computed, ``add_step`` once per step
    on one rank, ``merge`` the ranks, then read ``metrics``. Plain numpy inside, so it can be
    pickled and gathered."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, _KindSums] = {kind: _KindSums() for kind in KINDS}
        self._policy = 0.0
        self._kl = 0.0
        self._groups = np.zeros(3, dtype=np.int64)  # groups, dead before mixing, dead after
        self._ages = np.zeros(2)  # replays, sum of their ages
        self._age_max = 0
        self.skipped = 0  # micro-batches and updates that were left out, see `skip`
        self.culprits: list[str] = []

    def add(self, output: LossOutput, entropy: Tensor | None = None) -> None:
        """Add a micro-batch that was trained on (one skipped for a NaN loss would spoil the means).

        ``entropy`` (B, T) in nats, of the next-token distribution at each completion token.
        """
        tokens = output.tokens
        if entropy is not None and entropy.shape != tokens.mask.shape:
            raise DataError(
                f"entropy has shape {tuple(entropy.shape)}, the loss {tuple(tokens.mask.shape)}"
            )
        self._policy += float(output.policy)
        self._kl += float(output.kl)
        for kind in KINDS:
            of_kind = tokens.is_replay if kind == "replay" else ~tokens.is_replay
            keep = tokens.mask & of_kind[:, None]
            if keep.any():
                self._kinds[kind].merge(_sums(tokens, keep, entropy))

    def skip(self, culprits: Sequence[str], count: int = 1) -> None:
        """Note what was left out because of a loss or gradient that is not finite, and its
        trajectories."""
        self.skipped += count
        self.culprits += culprits

    def add_step(
        self, advantages: Advantages, is_replay: Tensor, ages: Tensor | None = None
    ) -> None:
        """Add the advantages of a whole step and, in policy versions, the ``ages`` of its replays
        (any shape)."""
        for kind in KINDS:
            of_kind = is_replay.bool() if kind == "replay" else ~is_replay.bool()
            values = advantages.values[of_kind & advantages.scored].detach().cpu().double().numpy()
            inside = np.clip(values, ADVANTAGE_EDGES[0], ADVANTAGE_EDGES[-1])
            self._kinds[kind].advantages += np.histogram(inside, ADVANTAGE_EDGES)[0]
        before, after = advantages.dead_before, advantages.dead_after
        self._groups += np.array([len(before), int(before.sum()), int(after.sum())])
        if ages is not None and ages.numel():
            self._ages += np.array([ages.numel(), float(ages.sum())])
            self._age_max = max(self._age_max, int(ages.max()))

    def merge(self, other: StepMetrics) -> None:
        """Take in what another micro-batch or rank collected of the same step."""
        for kind in KINDS:
            self._kinds[kind].merge(other._kinds[kind])
        self._policy += other._policy
        self._kl += other._kl
        self._groups += other._groups
        self._ages += other._ages
        self._age_max = max(self._age_max, other._age_max)
        self.skipped += other.skipped
        self.culprits += other.culprits

    def metrics(self) -> dict[str, float]:
        """Metrics by name; one that nothing was measured for is left out.

        ``ratio/*`` of the surrogate before clipping; ``kl/behaviour_capped`` the mean of min(k3, 1
        nat); ``ess/*`` = (sum w)^2 / (n sum w^2) in (0, 1] over tokens, w = ratio x mismatch
        weight; ``kl/*`` k3 per token, ``entropy`` in nats; ``groups/dead_*`` shares of the groups.
        """
        found = {"loss/policy": self._policy, "loss/kl": self._kl}
        whole = _KindSums()
        for kind in KINDS:
            sums = self._kinds[kind]
            whole.merge(sums)
            if not sums.sums[_TOKENS]:
                continue
            found[f"ratio/{kind}/mean"] = sums.mean(_RATIO)
            found[f"ratio/{kind}/max"] = sums.ratio_max
            found[f"clip_fraction/{kind}"] = sums.mean(_CLIPPED)
            if sums.sums[
                _WEIGHT2
            ]:  # 0 when every weight was masked: no effective sample to speak of
                found[f"ess/{kind}"] = float(
                    sums.sums[_WEIGHT] ** 2 / (sums.sums[_TOKENS] * sums.sums[_WEIGHT2])
                )
            found |= _means(sums, f"/{kind}")
        found |= _means(whole, "")
        if self._groups[0]:
            found["groups/dead_before"] = float(self._groups[1] / self._groups[0])
            found["groups/dead_after"] = float(self._groups[2] / self._groups[0])
        if self._ages[0]:
            found["age/replay/mean"] = float(self._ages[1] / self._ages[0])
            found["age/replay/max"] = float(self._age_max)
        return found

    def distributions(self) -> dict[str, list[float]]:
        """JSON-ready, of each kind that was trained: "advantages/<kind>", (41,) scored completions
        per bin of ``ADVANTAGE_EDGES``, 0 inside the middle one; and by normalised position
        "position_loss/<kind>", (20,) sums of the tokens' absolute surrogate loss, and
        "position_tokens/<kind>", (20,)."""
        found: dict[str, list[float]] = {}
        for kind in KINDS:
            sums = self._kinds[kind]
            if sums.sums[_TOKENS] or sums.advantages.any():
                found[f"advantages/{kind}"] = sums.advantages.tolist()
                found[f"position_loss/{kind}"] = sums.position_loss.tolist()
                found[f"position_tokens/{kind}"] = sums.position_count.tolist()
        return found


def _means(sums: _KindSums, suffix: str) -> dict[str, float]:
    """Token means that are given for fresh, replayed and all tokens."""
    found = {}
    if sums.sums[_TOKENS]:
        found[f"kl/behaviour{suffix}"] = sums.mean(_KL_BEHAVIOUR)
        found[f"kl/behaviour_capped{suffix}"] = sums.mean(_KL_CAPPED)
    if sums.sums[_REFERENCED]:
        found[f"kl/reference{suffix}"] = sums.mean(_KL_REFERENCE, _REFERENCED)
    if sums.sums[_ENTROPIES]:
        found[f"entropy{suffix}"] = sums.mean(_ENTROPY, _ENTROPIES)
    return found


@torch.no_grad()
def _sums(tokens: TokenDiagnostics, keep: Tensor, entropy: Tensor | None) -> _KindSums:
    """Sums over the ``keep`` (B, T) tokens, in float64, read from the device once."""
    ratio = tokens.ratio[keep].double()
    weight = ratio * tokens.weight[keep].double()
    zero = ratio.new_zeros(())
    count = ratio.new_full((), len(ratio))
    reference, referenced = zero, zero
    if tokens.kl_reference is not None:
        reference, referenced = tokens.kl_reference[keep].double().sum(), count
    uncertainty, uncertainties = zero, zero
    if entropy is not None:
        uncertainty, uncertainties = entropy[keep].double().sum(), count
    totals = [
        count,
        ratio.sum(),
        weight.sum(),
        (weight**2).sum(),
        tokens.clipped[keep].double().sum(),
        tokens.kl_behaviour[keep].double().sum(),
        reference,
        referenced,
        uncertainty,
        uncertainties,
        tokens.kl_behaviour[keep].double().clamp(max=KL_CAP).sum(),
    ]
    position = (keep.long().cumsum(1) - 1).double() / (keep.sum(1, keepdim=True) - 1).clamp(min=1)
    bins = (position[keep] * POSITION_BINS).long().clamp(max=POSITION_BINS - 1)
    # index_add and not bincount: the latter has no deterministic form on a GPU.
    loss = ratio.new_zeros(POSITION_BINS).index_add(0, bins, tokens.loss[keep].double().abs())
    counts = ratio.new_zeros(POSITION_BINS).index_add(0, bins, torch.ones_like(ratio))
    flat = torch.cat([torch.stack([*totals, ratio.max()]), loss, counts]).cpu().numpy()
    sums, maximum, loss_sums, loss_counts = np.split(
        flat, np.cumsum([len(totals), 1, POSITION_BINS])
    )
    result = _KindSums(sums=sums.copy(), ratio_max=float(maximum[0]))
    result.position_loss, result.position_count = loss_sums, loss_counts
    return result


def reward_metrics(fresh: Sequence[Trajectory]) -> dict[str, float]:
    """Rewards, components (masked ones left out), lengths and hints of the fresh completions of a
    step."""
    rewards = np.array([trajectory.reward for trajectory in fresh])
    lengths = np.array([len(trajectory.token_ids) for trajectory in fresh])
    parts: dict[str, list[float]] = defaultdict(list)
    for trajectory in fresh:
        for name, value in trajectory.components.items():
            if value is not None:
                parts[name].append(value)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{f"reward/{name}": float(np.mean(values)) for name, values in parts.items()},
        "accuracy/train": float(np.mean(parts["accuracy"])) if parts["accuracy"] else float("nan"),
        "completion/length_mean": float(lengths.mean()),
        "completions/truncated_share": float(np.mean([t.finish_reason == "length" for t in fresh])),
        "hints/visits": float(sum(trajectory.hinted for trajectory in fresh)),
    }
