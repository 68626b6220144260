"""The frozen reference policy of the KL term; log-probabilities of replayed trajectories are
computed only once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.learner.batch.microbatch import Pending, Row, collate, padded
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy, PolicyOutput
from avatar_rl.learner.model.sequence import SequenceGroup
from avatar_rl.prompts.encoding.digest import prompt_digest

#: ``TrainEngine.score_base`` or ``FrozenEngine.score``.
Score = Callable[[Sequence[Pending], Pending, Sequence[bool]], Iterator[tuple[int, PolicyOutput]]]

_Key = tuple[str, int, int]


def _key(name: str, row: Row) -> _Key:
    """Prompt and completion tokens belong to the key: a buffer that was restored to an older state
    gives the same ids again."""
    return name, row.prompt.digest, prompt_digest(row.token_ids)


class ReferencePolicy:
    """k3 KL needs log pi_ref of every trained token (docs/method.md 1.1); a cache keyed by
    trajectory serves replays.

    The cache lives as long as this process and its one reference. Nothing of it is stored with the
    trajectories, so a run that is resumed with another ``model.reference`` computes all again."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: str,
        device: torch.device,
        cached: int,
        sequence: SequenceGroup | None = None,
    ) -> None:
        self.policy = Policy(load_model(path, dtype=dtype, device=device), sequence)
        self.policy.requires_grad_(False)
        self.device = device
        self.cached = cached
        self._cache: OrderedDict[_Key, NDArray[np.float32]] = OrderedDict()

    def prepare(
        self, ids: Sequence[Sequence[str]], plan: Sequence[Pending], spare: Pending
    ) -> None:
        """Told of an update's micro-batches, and of the ids of their trajectories, before its first
        backward. Collective; ``spare`` stands in for a micro-batch that a rank lacks."""

    @torch.no_grad()
    def logprobs(self, ids: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """(B, T) reference log-probabilities of a micro-batch's tokens, 0 where padded."""
        keys = [_key(name, row) for name, row in zip(ids, rows, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in self._cache]
        if missing:
            batch = collate([rows[i] for i in missing])
            scores = self.policy(self.policy.placed(batch, self.device)).logprobs.cpu().numpy()
            for row, i in zip(scores, missing, strict=True):
                self._cache[keys[i]] = row[: len(rows[i].token_ids)].copy()
        for key in keys:
            self._cache.move_to_end(key)
        result = padded([self._cache[key] for key in keys])
        for key in {keys[i] for i in missing}:
            if not np.isfinite(self._cache[key]).all():
                del self._cache[key]  # the next computation may be finite
        self._evict(len(keys))
        return result.to(self.device)

    def _evict(self, needed: int) -> None:
        while len(self._cache) > max(self.cached, needed):
            self._cache.popitem(last=False)


class JointReference(ReferencePolicy):
    """A reference that ranks score together: the trained policy with its adapter off, which is no
    second model, or one whose weights are split over the ranks.

    All that an update needs is computed before its first backward: the policy cannot be its own
    base between a forward and its backward, and ranks lack different trajectories.
    """

    def __init__(
        self, score: Score, *, device: torch.device, cached: int, policy: Policy | None = None
    ) -> None:
        self.score, self.device, self.cached = score, device, cached
        if policy is not None:  # a second model, which leaves the device with the first
            self.policy = policy
        self._cache = OrderedDict()
        self._needed = 0  # entries of the update that is trained

    def prepare(
        self, ids: Sequence[Sequence[str]], plan: Sequence[Pending], spare: Pending
    ) -> None:
        """Compute what the cache lacks. Collective under ZeRO 3."""
        for key in [key for key, found in self._cache.items() if not np.isfinite(found).all()]:
            del self._cache[key]  # the next computation may be finite
        keys = [
            [_key(name, row) for name, row in zip(names, batch.rows, strict=True)]
            for names, batch in zip(ids, plan, strict=True)
        ]
        self._needed = sum(map(len, keys))
        wanted = [any(key not in self._cache for key in some) for some in keys]
        for number, output in self.score(plan, spare, wanted):
            rows = plan[number].rows
            for key, row, scores in zip(
                keys[number], rows, output.logprobs.cpu().numpy(), strict=True
            ):
                self._cache[key] = scores[: len(row.token_ids)].copy()
        for some in keys:
            for key in some:
                self._cache.move_to_end(key)
        self._evict(self._needed)

    def logprobs(self, ids: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """(B, T) of what ``prepare`` was told of, 0 where padded."""
        keys = [_key(name, row) for name, row in zip(ids, rows, strict=True)]
        return padded([self._cache[key] for key in keys]).to(self.device)
