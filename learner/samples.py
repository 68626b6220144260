"""Completions that a run keeps to be read: which of a step's groups, and what is said of each.

Every rank makes the same choice from the same plan. Each notes the tokens of its own share; rank 0
makes rows of them all. docs/output.md has the layout of a row ("Saved samples")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.common.types import Json, JsonObject
from avatar_rl.learner.batch.plan import Standing, StepPlan, StepWork
from avatar_rl.learner.model.policy import PolicyOutput
from avatar_rl.prompts.record import Prompt

#: Decimals of what is said of a token.
DECIMALS = 4
_Values = NDArray[np.float32]
#: Number of the step's update, of the completion in its plan.
_Key = tuple[int, int]


class Prompts(Protocol):
    def __getitem__(self, prompt_id: str) -> Prompt: ...


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    def decode(
        self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str | list[str]: ...


@dataclass(frozen=True)
class TokenValues:
    """What the loss saw of a completion's T tokens; each (T,)."""

    log_ratio: _Values  # log-probability now minus the one at generation, nats
    entropy: _Values  # of the policy's next-token distribution, nats
    weight: _Values  # temporal advantage shaping


@dataclass(frozen=True)
class Shown:
    """A completion that will be a row, as its plan has it."""

    trajectory: Trajectory
    group: int  # number of the mixed group in the step
    replayed: bool
    advantage: float | None  # None: its reward is masked
    dead_before: bool  # its group teaches nothing without replays
    dead_after: bool  # nor with them


@dataclass
class SampleRecorder:
    """Notes what a step's rows need while it is trained."""

    groups: tuple[int, ...]  # numbers of the groups that are shown, in their order
    shown: dict[_Key, Shown] = field(default_factory=dict)
    tokens: dict[_Key, TokenValues] = field(default_factory=dict)
    update: int = -1

    @classmethod
    def of(cls, work: StepWork, count: int) -> SampleRecorder:
        return cls(tuple(informative(work.groups, count)))

    def begin_update(self, plan: StepPlan) -> None:
        """Note the completions of the next update's plan. Fresh ones are in every update: the first
        is the one that is shown."""
        self.update += 1
        for i, trajectory in enumerate(plan.trajectories):
            group, replayed = int(plan.groups[i]), bool(plan.is_replay[i])
            if group not in self.groups or (self.update and not replayed):
                continue
            scored = bool(plan.advantages.scored[i])
            self.shown[self.update, i] = Shown(
                trajectory,
                group,
                replayed,
                float(plan.advantages.values[i]) if scored else None,
                bool(plan.advantages.dead_before[group]),
                bool(plan.advantages.dead_after[group]),
            )

    @torch.no_grad()
    def add(self, indices: Sequence[int], output: PolicyOutput, weights: Tensor) -> None:
        """Note the tokens of a micro-batch: completions ``indices`` of the plan, ``weights`` (B, T)
        of the shaping."""
        rows = [row for row, i in enumerate(indices) if (self.update, i) in self.shown]
        if not rows:
            return  # nothing is copied from the device
        stacked = torch.stack([output.logprobs[rows], output.entropy[rows], weights[rows]])
        values: _Values = stacked.float().cpu().numpy()
        for number, row in enumerate(rows):
            key = (self.update, indices[row])
            trajectory = self.shown[key].trajectory
            logprobs, entropy, weight = values[:, number, : len(trajectory.token_ids)]
            self.tokens[key] = TokenValues(logprobs - trajectory.logprobs, entropy, weight)

    def rows(
        self,
        work: StepWork,
        standing: Mapping[tuple[str, bool], Standing],
        prompts: Prompts,
        tokenizer: Tokenizer,
    ) -> list[JsonObject]:
        """JSON-ready rows: group after group, the fresh completions of each before its replays."""
        place = {group: number for number, group in enumerate(self.groups)}
        order = sorted(self.shown, key=lambda key: (place[self.shown[key].group], key))
        return [
            _row(self.shown[key], self.tokens.get(key), work, standing, prompts, tokenizer)
            for key in order
        ]


def informative(groups: Sequence[Group], count: int) -> list[int]:
    """Numbers of the ``count`` groups that are worth reading: those with the most different rewards
    first, then in order of the step."""

    def spread(number: int) -> float:
        rewards = [trajectory.reward for trajectory in groups[number].trajectories]
        return float(np.std(rewards)) if rewards else 0.0

    return sorted(range(len(groups)), key=lambda number: (-round(spread(number), 6), number))[
        :count
    ]


def _row(
    shown: Shown,
    tokens: TokenValues | None,
    work: StepWork,
    standing: Mapping[tuple[str, bool], Standing],
    prompts: Prompts,
    tokenizer: Tokenizer,
) -> JsonObject:
    trajectory, group = shown.trajectory, work.groups[shown.group]
    known = standing.get((trajectory.prompt_id, trajectory.hinted), Standing(None, None))
    text, ends = pieces(tokenizer, trajectory.token_ids.tolist())
    row: JsonObject = {
        **prompts[trajectory.prompt_id].label(),
        "id": trajectory.id,
        "group": group.id,
        "replayed": shown.replayed,
        "text": text,
        "reward": trajectory.reward,
        "accuracy": trajectory.components.get("accuracy"),
        "components": dict(trajectory.components),
        "details": dict(trajectory.details),
        "imputed": not shown.replayed and trajectory.index in group.imputed,
        "hinted": trajectory.hinted,
        "version": trajectory.version,
        "versions": [list(part) for part in trajectory.versions],
        "age": work.version - trajectory.version,
        "tier": known.tier,
        "baseline": _short(known.baseline),
        "advantage": _short(shown.advantage),
        "dead_before": shown.dead_before,
        "dead_after": shown.dead_after,
        "finish_reason": trajectory.finish_reason,
        "temperature": trajectory.temperature,
        "tokens": len(trajectory.token_ids),
        "token_ends": list(ends),
        "logprobs": _list(trajectory.logprobs),
    }
    if tokens is not None:
        row["log_ratio"] = _list(tokens.log_ratio)
        row["entropy"] = _list(tokens.entropy)
        row["weight"] = _list(tokens.weight)
    return row


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ``ids``, special tokens included, and the end of each token in its characters.

    A character of several tokens belongs to the last of them."""
    parts = [""] * len(ids)
    first = start = 0  # of the tokens decoded together, and of those not yet told apart
    for number in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[first:start])
        upto = _decode(tokenizer, ids[first:number])
        if upto.endswith("\N{REPLACEMENT CHARACTER}") and number < len(ids):
            continue  # a part of a character
        parts[number - 1] = upto[len(before) :]
        first, start = start, number
    ends = list(accumulate(len(part) for part in parts))
    return "".join(parts), ends


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, DECIMALS)


def _list(values: NDArray[np.float32]) -> list[Json]:
    """Rounded; None for what is not finite."""
    return [round(float(v), DECIMALS) if np.isfinite(v) else None for v in values]
