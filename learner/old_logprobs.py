"""The policy that a step's ratios are taken against: the trainer's own at the start of the step
(docs/method.md 1.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from avatar_rl.learner.config import OldRule


class OldLogprobs:
    """Log-probabilities of one step's completions before its first update.

    The first update computes them anyway: its forward runs on the weights that the step starts
    from. Later updates read what the first one noted. A later update may give a completion to
    another rank, so ranks exchange their notes (``share``).
    """

    def __init__(self, rule: OldRule, *, updates: int, ranks: int) -> None:
        self.rule, self.updates, self.ranks = rule, updates, ranks
        self._noted: dict[str, Tensor] = {}  # (T,) by trajectory
        self._is_first = True

    def of(self, ids: Sequence[str], logprobs: Tensor, mask: Tensor) -> Tensor | None:
        """(B, T) log-probabilities that the ratio is taken against; None for the behaviour's.

        Args:
            ids: Of the B trajectories.
            logprobs: (B, T) of the current policy.
            mask: (B, T), 1 = completion token, left-aligned.
        """
        if self.rule == "behaviour":
            return None
        now = logprobs.detach()
        if self.rule == "current" or self.updates == 1:
            return now
        if self._is_first:
            lengths, values = mask.sum(1).long().tolist(), now.cpu()
            self._noted |= {
                name: values[row, : lengths[row]].clone() for row, name in enumerate(ids)
            }
            return now
        old = now.cpu().clone()
        for row, name in enumerate(ids):
            if (noted := self._noted.get(name)) is not None:  # a replay of this update has none
                old[row, : len(noted)] = noted
        return old.to(now.device)

    def share(self) -> None:
        """The first update is over: have every rank know what the others noted. Collective."""
        if self._is_first and self._needs_notes and self.ranks > 1:
            of_ranks: list[dict[str, Tensor]] = [{}] * self.ranks
            dist.all_gather_object(of_ranks, self._noted)
            self._noted = {name: values for part in of_ranks for name, values in part.items()}
        self._is_first = False

    @property
    def _needs_notes(self) -> bool:
        return self.rule == "trainer" and self.updates > 1
