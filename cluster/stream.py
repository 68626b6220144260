"""The prompt stream: which prompt is asked when. A pure function of the seed, so a position is all a resume needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from buffer_service.tickets import Ticket
from cluster.config import LoopConfig


class PromptStream:
    """Endless epochs over the prompt ids, each shuffled from (seed, epoch); ``prompts_per_step`` tickets a step."""

    def __init__(self, prompt_ids: Sequence[str], loop: LoopConfig, *, seed: int, warm_up: int) -> None:
        self.prompt_ids = list(prompt_ids)
        self.loop, self.seed, self.warm_up = loop, seed, warm_up
        self._orders: dict[int, list[int]] = {}

    def tickets(self, step: int) -> list[Ticket]:
        """The tickets of one step, in order."""
        count = self.loop.prompts_per_step
        completions = self.loop.fresh_at(step, self.warm_up)
        return [self._ticket(seq, step, completions) for seq in range(step * count, (step + 1) * count)]

    def _ticket(self, seq: int, step: int, completions: int) -> Ticket:
        epoch, position = divmod(seq, len(self.prompt_ids))
        prompt_id = self.prompt_ids[self._order(epoch)[position]]
        return Ticket(seq=seq, prompt_id=prompt_id, step=step, epoch=epoch, kind="train", n=completions)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = np.random.default_rng((self.seed, epoch))
            self._orders = {epoch: generator.permutation(len(self.prompt_ids)).tolist()} | {
                known: order for known, order in self._orders.items() if known >= epoch - 1
            }
        return self._orders[epoch]


def evaluation_tickets(prompt_ids: Sequence[str], *, round: int, min_version: int) -> list[Ticket]:
    """One greedy completion per held-out prompt, by a policy of at least ``min_version``."""
    return [
        Ticket(seq=seq, prompt_id=prompt_id, step=0, epoch=0, kind="eval", round=round, n=1, min_version=min_version)
        for seq, prompt_id in enumerate(prompt_ids)
    ]
