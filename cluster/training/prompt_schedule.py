"""The prompt schedule: which prompts each step asks.

``epochs`` is a pure function of the seed, so the number of the step is all that a resume needs.
``open`` also reads the prompts' moving averages, which are in the buffer (exact at max_staleness
0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.cluster.config import LoopConfig

Averages = Mapping[str, float]  # Rbar by prompt id, of the prompts that were asked

FLOOR = 0.02  # weight of a solved prompt: asked again now and then, so that it is not forgotten


class PromptSchedule:
    """``loop.prompts_per_step`` rollout requests for each step.

    Schedule ``epochs`` passes over the prompts again and again, each pass shuffled from (seed,
    epoch). Schedule ``open`` prefers the prompts with most left to learn (``open_prompts``).

    Args:
        prompt_ids: The training prompts.
        loop: Prompts a step, completions a prompt, the schedule's name.
        seed: Of the run.
        warm_up: Stored trajectories until which whole groups are generated (docs/method.md 1.3).
        full_reward: The largest reward a completion can have.
        first_seq: Number of the first request; imported replay is numbered below it.

    With ``loop.dynamic_sampling`` every request brings spare prompts, and takes that many more
    numbers: those of one group's attempts are ``attempts * slot`` and following.
    """

    def __init__(
        self,
        prompt_ids: Sequence[str],
        loop: LoopConfig,
        *,
        seed: int,
        warm_up: int,
        full_reward: float = 1.0,
        first_seq: int = 0,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.loop, self.seed, self.warm_up, self.full_reward = loop, seed, warm_up, full_reward
        self.attempts = loop.dynamic_sampling.attempts
        self.first_seq = -(-first_seq // self.attempts) * self.attempts
        self._orders: dict[int, list[int]] = {}

    def requests(self, step: int, averages: Averages | None = None) -> list[RolloutRequest]:
        """The requests of one step, in order. Schedule ``open`` needs the moving average reward
        (Rbar) of the prompts that were asked before."""
        count = self.loop.prompts_per_step
        completions = self.loop.fresh_at(step, self.warm_up)
        positions = range(step * count, (step + 1) * count)
        if self.loop.schedule == "open":
            missing = {
                prompt_id: self.full_reward - rbar for prompt_id, rbar in (averages or {}).items()
            }
            drawn = open_prompts(
                self.prompt_ids, missing, count * self.attempts, seed=self.seed, step=step
            )
            chosen = [drawn[slot::count] for slot in range(count)]
        else:
            chosen = [self._prompts_at(position) for position in positions]
        return [
            RolloutRequest(
                seq=self.first_seq + position * self.attempts,
                prompt_id=prompt_ids[0],
                step=step,
                epoch=self._epoch(position),
                kind="train",
                n=completions,
                spares=tuple(prompt_ids[1:]),
            )
            for position, prompt_ids in zip(positions, chosen, strict=True)
        ]

    def _epoch(self, position: int) -> int:
        return position // len(self.prompt_ids)

    def _prompts_at(self, position: int) -> list[str]:
        """The prompt of a position and its spares. They are spread over the pass, so that no prompt
        comes twice in a step of a pool that is large enough."""
        order, size = self._order(self._epoch(position)), len(self.prompt_ids)
        stride = max(self.loop.prompts_per_step, size // self.attempts)
        return [
            self.prompt_ids[order[(position + attempt * stride) % size]]
            for attempt in range(self.attempts)
        ]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = np.random.default_rng((self.seed, epoch))
            self._orders = {epoch: generator.permutation(len(self.prompt_ids)).tolist()} | {
                known: order for known, order in self._orders.items() if known >= epoch - 1
            }
        return self._orders[epoch]


def open_prompts(
    prompt_ids: Sequence[str], missing: Mapping[str, float], count: int, *, seed: int, step: int
) -> list[str]:
    """``count`` prompts for ``step``: those never asked first, in random order, then a weighted
    draw.

    ``missing`` is the full reward less Rbar of every prompt that was asked. A weight is ``FLOOR +
    max(0, missing)``. Prompts are drawn without replacement (Efraimidis and Spirakis 2006: the
    smallest ``Exp(1) / weight``), and all over again where ``count`` exceeds the prompts. Equal
    arguments give equal prompts.
    """
    generator = np.random.default_rng((seed, step, 1))
    chosen: list[str] = []
    while len(chosen) < count:
        waits = generator.exponential(size=len(prompt_ids))
        keys = [
            (True, wait / (FLOOR + max(0.0, missing[prompt_id])))
            if prompt_id in missing
            else (False, wait)
            for prompt_id, wait in zip(prompt_ids, waits, strict=True)
        ]
        order = sorted(range(len(prompt_ids)), key=lambda i: keys[i])
        chosen += [prompt_ids[i] for i in order[: count - len(chosen)]]
    return chosen


def evaluation_requests(
    prompt_ids: Sequence[str], *, round: int, min_version: int, samples: int = 1
) -> list[RolloutRequest]:
    """``samples`` completions per prompt (1 is greedy), by a policy of at least ``min_version``."""
    return [
        RolloutRequest(
            seq=seq,
            prompt_id=prompt_id,
            step=0,
            epoch=0,
            kind="eval",
            round=round,
            n=samples,
            min_version=min_version,
        )
        for seq, prompt_id in enumerate(prompt_ids)
    ]
