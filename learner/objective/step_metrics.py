"""Metrics of a training step: sums and maxima of what the loss saw, which merge over micro-batches
and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.buffer_service.records.requests import PromptKl
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

#: Nats at which ``kl/behaviour_capped`` holds a token's k3. One token of an old replay may reach
#: thousands and hide the others.
KL_CAP = 1.0


@dataclass
class TokenSums:
    """Sums over completion tokens; logarithms are natural."""

    tokens: float = 0.0
    ratio: float = 0.0
    weight: float = 0.0  # importance weight: ratio times mismatch weight
    weight_squared: float = 0.0
    clipped: float = 0.0
    corrected: float = 0.0  # tokens of completions that the trainer has an `old` of its own for
    mismatch: float = 0.0  # mismatch weight of those
    mismatch_kl: float = 0.0  # k3 of trainer and sampler
    rejected: float = 0.0
    kl_behaviour: float = 0.0
    kl_behaviour_capped: float = 0.0  # each token's k3 held at ``KL_CAP``
    kl_reference: float = 0.0
    reference_tokens: float = 0.0  # those that a reference policy has scored
    entropy: float = 0.0
    entropy_tokens: float = 0.0  # those whose entropy is known

    def merge(self, other: TokenSums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class KindSums:
    """What a step collects of fresh or of replayed completions."""

    tokens: TokenSums = field(default_factory=TokenSums)
    ratio_max: float = -np.inf
    position_loss: NDArray[np.float64] = field(default_factory=lambda: np.zeros(POSITION_BINS))
    position_tokens: NDArray[np.float64] = field(default_factory=lambda: np.zeros(POSITION_BINS))
    advantages: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(len(ADVANTAGE_EDGES) - 1)
    )

    def merge(self, other: KindSums) -> None:
        self.tokens.merge(other.tokens)
        self.ratio_max = max(self.ratio_max, other.ratio_max)
        self.position_loss += other.position_loss
        self.position_tokens += other.position_tokens
        self.advantages += other.advantages


@dataclass
class ComputedSums:
    """How much the decoder computed, forward and backward, of what is trained on."""

    positions: int = 0  # that went through its layers, prompts and media included
    scored: int = 0  # whose logits were computed
    pairs: int = 0  # of positions, one of which may look at the other

    def add(self, prompt: int, completions: Sequence[int]) -> None:
        """A prompt of so many positions, and those of its completions behind it."""
        self.positions += prompt + sum(completions)
        # Each completion also has a token that its prompt's last position predicts.
        self.scored += sum(completions) + len(completions)
        self.pairs += prompt * (prompt + 1) // 2
        self.pairs += sum(length * prompt + length * (length + 1) // 2 for length in completions)

    def merge(self, other: ComputedSums) -> None:
        self.positions += other.positions
        self.scored += other.scored
        self.pairs += other.pairs


@dataclass
class StepMetrics:
    """Collects one step, as sums that merge over micro-batches and ranks.

    ``add`` every micro-batch where it is computed and ``add_step`` once per step on one rank.
    Then ``merge`` the ranks and read ``metrics``. It holds plain numbers and numpy arrays, so it
    can be pickled and gathered.
    """

    kinds: dict[Kind, KindSums] = field(
        default_factory=lambda: {kind: KindSums() for kind in KINDS}
    )
    policy_loss: float = 0.0
    kl_loss: float = 0.0
    groups: int = 0
    dead_before: int = 0  # groups that teach nothing without replays
    dead_after: int = 0  # groups that teach nothing with them
    replays: int = 0
    age: float = 0.0  # sum over the replays, in policy versions
    age_max: int = 0
    on_policy_gap: float = 0.0  # sum over ``on_policy_tokens``, see ``add_on_policy``
    on_policy_tokens: int = 0
    computed: ComputedSums = field(default_factory=ComputedSums)
    skipped: int = 0  # micro-batches and updates that were left out, see ``skip``
    unreadable: int = 0  # completions left out since their prompt cannot be encoded
    culprits: list[str] = field(default_factory=list)  # ids of trajectories
    #: By prompt, of its tokens: k3 to the behaviour policy, each held at ``KL_CAP``; their number;
    #: how many of them are fresh.
    prompts: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(
        self,
        output: LossOutput,
        entropy: Tensor | None = None,
        prompt_ids: Sequence[str] = (),
    ) -> None:
        """Add a micro-batch that was trained on (one skipped for a NaN loss would spoil the means).

        ``entropy`` (B, T) in nats, of the next-token distribution at each completion token.
        ``prompt_ids`` name the B completions' prompts for ``behaviour_kl``. Raises DataError when
        the entropy has another shape than the loss.
        """
        tokens = output.tokens
        if entropy is not None and entropy.shape != tokens.mask.shape:
            raise DataError(
                f"entropy has shape {tuple(entropy.shape)}, the loss {tuple(tokens.mask.shape)}"
            )
        self.policy_loss += float(output.policy)
        self.kl_loss += float(output.kl)
        for kind in KINDS:
            of_kind = tokens.is_replay if kind == "replay" else ~tokens.is_replay
            keep = tokens.mask & of_kind[:, None]
            if keep.any():
                self.kinds[kind].merge(_sums(tokens, keep, entropy))
        if prompt_ids:
            for prompt_id, sums in zip(prompt_ids, _row_kl(tokens), strict=True):
                self._add_prompt(prompt_id, sums)

    def _add_prompt(self, prompt_id: str, sums: NDArray[np.float64]) -> None:
        known = self.prompts.get(prompt_id)
        self.prompts[prompt_id] = sums if known is None else known + sums

    def behaviour_kl(self) -> list[PromptKl]:
        """Each prompt's own KL to the behaviour policy, for its hint gate (docs/method.md 1.4)."""
        return [
            PromptKl(prompt_id=prompt_id, k3=float(k3), tokens=int(tokens), fresh=bool(fresh))
            for prompt_id, (k3, tokens, fresh) in sorted(self.prompts.items())
            if tokens
        ]

    def add_on_policy(
        self, fresh: Sequence[Trajectory], logprobs: Sequence[NDArray[np.float32]], version: int
    ) -> None:
        """Add how far the engine's log-probabilities are from ours on the tokens that it generated
        with the very weights, ``version``, that are trained.

        Both sides have computed the same, unless an update in place has left something as it was.
        """
        for trajectory, ours in zip(fresh, logprobs, strict=True):
            versions, tokens = zip(*trajectory.versions, strict=True)
            same = np.repeat(versions, tokens) == version
            gap = np.abs(ours[same].astype(np.float64) - trajectory.logprobs[same])
            self.on_policy_gap += float(gap.sum())
            self.on_policy_tokens += gap.size

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
            self.kinds[kind].advantages += np.histogram(inside, ADVANTAGE_EDGES)[0]
        self.groups += len(advantages.dead_before)
        self.dead_before += int(advantages.dead_before.sum())
        self.dead_after += int(advantages.dead_after.sum())
        if ages is not None and ages.numel():
            self.replays += ages.numel()
            self.age += float(ages.sum())
            self.age_max = max(self.age_max, int(ages.max()))

    def merge(self, other: StepMetrics) -> None:
        """Take in what another micro-batch or rank collected of the same step."""
        for kind in KINDS:
            self.kinds[kind].merge(other.kinds[kind])
        self.policy_loss += other.policy_loss
        self.kl_loss += other.kl_loss
        self.groups += other.groups
        self.dead_before += other.dead_before
        self.dead_after += other.dead_after
        self.replays += other.replays
        self.age += other.age
        self.age_max = max(self.age_max, other.age_max)
        self.on_policy_gap += other.on_policy_gap
        self.on_policy_tokens += other.on_policy_tokens
        self.computed.merge(other.computed)
        self.skipped += other.skipped
        self.unreadable += other.unreadable
        self.culprits += other.culprits
        for prompt_id, sums in other.prompts.items():
            self._add_prompt(prompt_id, sums)

    def metrics(self) -> dict[str, float]:
        """Metrics by name; one that nothing was measured for is left out.

        ``ratio/*`` of the surrogate before clipping; ``kl/behaviour_capped`` the mean of min(k3, 1
        nat); ``ess/*`` = (sum w)^2 / (n sum w^2) in (0, 1] over tokens, w = ratio x mismatch
        weight; ``kl/*`` k3 per token, ``entropy`` in nats; ``groups/dead_*`` shares of the groups.
        """
        found = {"loss/policy": self.policy_loss, "loss/kl": self.kl_loss}
        whole = TokenSums()
        for kind in KINDS:
            sums = self.kinds[kind].tokens
            whole.merge(sums)
            if not sums.tokens:
                continue
            found[f"ratio/{kind}/mean"] = sums.ratio / sums.tokens
            found[f"ratio/{kind}/max"] = self.kinds[kind].ratio_max
            found[f"clip_fraction/{kind}"] = sums.clipped / sums.tokens
            # 0 when every weight was masked: no effective sample to speak of
            if sums.weight_squared:
                found[f"ess/{kind}"] = sums.weight**2 / (sums.tokens * sums.weight_squared)
            if sums.corrected:
                found[f"mismatch/weight/{kind}"] = sums.mismatch / sums.corrected
                found[f"mismatch/kl/{kind}"] = sums.mismatch_kl / sums.corrected
                found[f"mismatch/rejected/{kind}"] = sums.rejected / sums.corrected
            found |= _means(sums, f"/{kind}")
        found |= _means(whole, "")
        if self.groups:
            found["groups/dead_before"] = self.dead_before / self.groups
            found["groups/dead_after"] = self.dead_after / self.groups
        if self.on_policy_tokens:
            found["mismatch/on_policy"] = self.on_policy_gap / self.on_policy_tokens
            found["mismatch/on_policy_tokens"] = float(self.on_policy_tokens)
        if self.computed.positions:
            found["tokens/computed"] = float(self.computed.positions)
            found["tokens/scored"] = float(self.computed.scored)
            found["tokens/pairs"] = float(self.computed.pairs)
        if self.replays:
            found["age/replay/mean"] = self.age / self.replays
            found["age/replay/max"] = float(self.age_max)
        return found

    def distributions(self) -> dict[str, list[float]]:
        """JSON-ready, of each kind that was trained.

        "advantages/<kind>", (41,) scored completions per bin of ``ADVANTAGE_EDGES``, 0 inside the
        middle one. By normalised position: "position_loss/<kind>", (20,) sums of the tokens'
        absolute surrogate loss, and "position_tokens/<kind>", (20,).
        """
        found: dict[str, list[float]] = {}
        for kind in KINDS:
            sums = self.kinds[kind]
            if sums.tokens.tokens or sums.advantages.any():
                found[f"advantages/{kind}"] = sums.advantages.tolist()
                found[f"position_loss/{kind}"] = sums.position_loss.tolist()
                found[f"position_tokens/{kind}"] = sums.position_tokens.tolist()
        return found


def _means(sums: TokenSums, suffix: str) -> dict[str, float]:
    """Token means that are given for fresh, replayed and all tokens."""
    found = {}
    if sums.tokens:
        found[f"kl/behaviour{suffix}"] = sums.kl_behaviour / sums.tokens
        found[f"kl/behaviour_capped{suffix}"] = sums.kl_behaviour_capped / sums.tokens
    if sums.reference_tokens:
        found[f"kl/reference{suffix}"] = sums.kl_reference / sums.reference_tokens
    if sums.entropy_tokens:
        found[f"entropy{suffix}"] = sums.entropy / sums.entropy_tokens
    return found


@torch.no_grad()
def _row_kl(tokens: TokenDiagnostics) -> NDArray[np.float64]:
    """(B, 3): capped k3 to the behaviour policy summed over a completion's tokens, their number,
    and that number again where the completion is fresh."""
    mask = tokens.mask.double()
    kl = torch.where(tokens.mask, tokens.kl_behaviour, 0).double().clamp(max=KL_CAP).sum(1)
    count = mask.sum(1)
    fresh = count.masked_fill(tokens.is_replay, 0)
    found: NDArray[np.float64] = torch.stack([kl, count, fresh], 1).cpu().numpy()
    return found


@torch.no_grad()
def _sums(tokens: TokenDiagnostics, keep: Tensor, entropy: Tensor | None) -> KindSums:
    """Sums over the ``keep`` (B, T) tokens, in float64, read from the device once."""
    ratio = tokens.ratio[keep].double()
    weight = ratio * tokens.weight[keep].double()
    kl_behaviour = tokens.kl_behaviour[keep].double()
    count = ratio.new_full((), len(ratio))
    totals = {
        "tokens": count,
        "ratio": ratio.sum(),
        "weight": weight.sum(),
        "weight_squared": (weight**2).sum(),
        "clipped": tokens.clipped[keep].double().sum(),
        "kl_behaviour": kl_behaviour.sum(),
        "kl_behaviour_capped": kl_behaviour.clamp(max=KL_CAP).sum(),
    }
    if tokens.mismatch_kl is not None:
        totals["corrected"] = count
        totals["mismatch"] = tokens.weight[keep].double().sum()
        totals["mismatch_kl"] = tokens.mismatch_kl[keep].double().sum()
        totals["rejected"] = tokens.rejected[:, None].expand_as(keep)[keep].double().sum()
    if tokens.kl_reference is not None:
        totals["kl_reference"] = tokens.kl_reference[keep].double().sum()
        totals["reference_tokens"] = count
    if entropy is not None:
        totals["entropy"] = entropy[keep].double().sum()
        totals["entropy_tokens"] = count
    position = (keep.long().cumsum(1) - 1).double() / (keep.sum(1, keepdim=True) - 1).clamp(min=1)
    bins = (position[keep] * POSITION_BINS).long().clamp(max=POSITION_BINS - 1)
    # index_add and not bincount: the latter has no deterministic form on a GPU.
    loss = ratio.new_zeros(POSITION_BINS).index_add(0, bins, tokens.loss[keep].double().abs())
    counts = ratio.new_zeros(POSITION_BINS).index_add(0, bins, torch.ones_like(ratio))
    flat = torch.cat([torch.stack([*totals.values(), ratio.max()]), loss, counts]).cpu().numpy()
    numbers, position_loss, position_tokens = np.split(
        flat, [len(totals) + 1, len(totals) + 1 + POSITION_BINS]
    )
    *sums, ratio_max = numbers.tolist()
    return KindSums(
        tokens=TokenSums(**dict(zip(totals, sums, strict=True))),
        ratio_max=ratio_max,
        position_loss=position_loss,
        position_tokens=position_tokens,
    )


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
    masked = {
        name: float(np.mean([t.components.get(name, 0.0) is None for t in fresh]))
        for name in sorted({name for t in fresh for name in t.components})
    }
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{f"reward/{name}": float(np.mean(values)) for name, values in parts.items()},
        **{f"reward_std/{name}": float(np.std(values)) for name, values in parts.items() if values},
        **{f"masked/{name}": share for name, share in masked.items()},
        "accuracy/train": float(np.mean(parts["accuracy"])) if parts["accuracy"] else float("nan"),
        "completion/length_mean": float(lengths.mean()),
        "completion/length_min": float(lengths.min()),
        "completion/length_max": float(lengths.max()),
        "completions/truncated_share": float(np.mean([t.finish_reason == "length" for t in fresh])),
        "hints/visits": float(sum(trajectory.hinted for trajectory in fresh)),
    }
