"""Ranks in lockstep: what each forward and backward has to run, so that no rank waits for another
one for ever.

Under ZeRO 3 ranks gather weights together in every forward. Under ZeRO 2 and 3 they exchange
gradients in every backward, under ZeRO 1 once per step. So what one of them needs, all run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch.distributed as dist

from avatar_rl.learner.batch.microbatch import MicroBatch, Pending
from avatar_rl.learner.model.media import TOWERS
from avatar_rl.learner.model.policy import Policy

#: What ranks must do alike: kinds of media that are encoded, runs of the head.
Needs = tuple[frozenset[str], int]


class Lockstep:
    """What the ranks of one policy run together. Its methods, but for ``needs``, are collective."""

    def __init__(self, policy: Policy, *, ranks: int, stage: int) -> None:
        self.policy, self.ranks, self.stage = policy, ranks, stage
        # Media whose encoders ranks exchange something for: gradients, under ZeRO 3 the weights
        # themselves.
        self._shared = frozenset(
            kind
            for kind, word in TOWERS.items()
            if any(
                word in name and (parameter.requires_grad or stage == 3)
                for name, parameter in policy.named_parameters()
            )
        )

    def needs(self, batch: MicroBatch | Pending) -> Needs:
        """What this rank alone needs for a micro-batch."""
        return frozenset(batch.encoders & self._shared), self.policy.head_runs(batch.tokens)

    def plan(
        self, micro_batches: Sequence[MicroBatch | Pending], spare: MicroBatch | Pending
    ) -> list[Needs]:
        """What each forward of this rank runs; under ZeRO 2 and 3 there are equally many on all
        ranks, and those that a rank lacks run on ``spare``."""
        mine = [self.needs(batch) for batch in micro_batches or [spare]]
        fill = self.needs(spare)
        if self.ranks == 1 or self.stage == 0:
            return mine
        of_ranks: list[tuple[list[Needs], Needs]] = [([], (frozenset(), 0))] * self.ranks
        dist.all_gather_object(of_ranks, (mine, fill))
        if self.stage == 1:
            # Gradients are exchanged once per step: what any rank encodes, all must have encoded.
            everything = frozenset().union(*(kinds for needs, _ in of_ranks for kinds, _ in needs))
            (kinds, runs), *others = mine
            return [(kinds | everything, runs), *others]
        most = max(len(needs) for needs, _ in of_ranks)
        meetings = zip(
            *(needs + [extra] * (most - len(needs)) for needs, extra in of_ranks), strict=True
        )
        return [
            (frozenset().union(*(kinds for kinds, _ in meeting)), max(runs for _, runs in meeting))
            for meeting in meetings
        ]

    def runs(
        self,
        micro_batches: Sequence[MicroBatch | Pending],
        spare: MicroBatch | Pending,
        wanted: Sequence[bool],
    ) -> Iterator[tuple[int, MicroBatch, Needs]]:
        """(Number, micro-batch, needs) of each forward without a backward that this rank runs for
        its ``wanted`` micro-batches.

        Under ZeRO 3 it also runs what another rank wants; numbers beyond its own are ``spare``.
        """
        runs = list(wanted)
        if self.ranks > 1 and self.stage == 3:
            plan = self.plan(micro_batches, spare)
            of_ranks: list[list[bool]] = [[]] * self.ranks
            dist.all_gather_object(of_ranks, runs)
            runs = [any(flags) for flags in zip_longest(*of_ranks, fillvalue=False)]
            runs += [False] * (len(plan) - len(runs))
        else:
            plan = [self.needs(batch) for batch in micro_batches]
        for number, (needs, runs_it) in enumerate(zip(plan, runs, strict=False)):
            if not runs_it:
                continue
            pending = micro_batches[number] if number < len(micro_batches) else spare
            yield number, pending.collate() if isinstance(pending, Pending) else pending, needs
