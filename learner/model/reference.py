"""The frozen reference policy of the KL term; log-probabilities of replayed trajectories are
computed only once, by any rank."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.learner.batch.microbatch import Pending, Row, collate, padded
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy, PolicyOutput
from avatar_rl.learner.model.sequence import SequenceGroup
from avatar_rl.prompts.encoding.digest import prompt_digest

#: ``TrainEngine.score_base`` or ``FrozenEngine.score``.
Score = Callable[[Sequence[Pending], Pending, Sequence[bool]], Iterator[tuple[int, PolicyOutput]]]

Key = tuple[str, int, int]


def _key(name: str, row: Row) -> Key:
    """Prompt and completion tokens belong to the key: a buffer that was restored to an older state
    gives the same ids again."""
    return name, row.prompt.digest, prompt_digest(row.token_ids)


class ReferenceCache:
    """Reference log-probabilities (T,) float32 by trajectory; the least recently used leave first.

    After ``share`` every rank knows what the others computed: a replay is trained on any of them.
    A checkpoint holds ``state``. ``source`` names the reference's weights and dtype: what another
    one computed is not taken over.
    """

    def __init__(self, room: int, source: str = "") -> None:
        self.room, self.source = room, source
        self._held: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()
        self._news: dict[Key, NDArray[np.float32]] = {}  # since the last ``share``
        self._bad: set[Key] = set()  # not finite

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def __getitem__(self, key: Key) -> NDArray[np.float32]:
        return self._held[key]

    def note(self, key: Key, values: NDArray[np.float32]) -> None:
        """What this rank computed."""
        self._held[key] = self._news[key] = values.copy()
        if not np.isfinite(values).all():
            self._bad.add(key)

    def use(self, keys: Sequence[Key]) -> None:
        """They leave last, and whoever was used before leaves where there is no room. A step may
        need more than there is room for."""
        for key in keys:
            self._held.move_to_end(key)
        self._evict(len(keys))

    def forget_bad(self) -> None:
        """Drop what is not finite: the next computation may be."""
        for key in self._bad:
            self._held.pop(key, None)
            self._news.pop(key, None)
        self._bad.clear()

    def share(self, ranks: int) -> None:
        """Have every rank know what each has computed since the last time. Collective."""
        self.forget_bad()
        if ranks > 1:
            of_ranks: list[dict[Key, NDArray[np.float32]]] = [{}] * ranks
            dist.all_gather_object(of_ranks, self._news)
            for news in of_ranks:
                for key, values in news.items():
                    self._held.setdefault(key, values)
            self._evict(0)
        self._news = {}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that ``load`` takes. Later changes do not touch them."""
        return {"source": self.source, "held": dict(self._held)}

    @staticmethod
    def packed(state: Mapping[str, Any]) -> dict[str, Any]:
        """A ``state`` as few large tensors, for a file."""
        held: Mapping[Key, NDArray[np.float32]] = state["held"]
        values = [*held.values()] or [np.zeros(0, dtype=np.float32)]
        return {
            "source": state["source"],
            "keys": [list(key) for key in held],
            "lengths": [len(found) for found in held.values()],
            "values": torch.from_numpy(np.concatenate(values)),
        }

    def load(self, packed: Mapping[str, Any]) -> int:
        """Take over what ``packed`` gave; the number of trajectories, 0 of another reference."""
        if packed["source"] != self.source:
            return 0
        ends = np.cumsum(packed["lengths"])
        parts = np.split(packed["values"].numpy(), ends[:-1]) if len(ends) else []
        for (name, prompt, tokens), values in zip(packed["keys"], parts, strict=True):
            self._held[name, prompt, tokens] = values.copy()
        self._evict(0)
        return len(parts)

    def _evict(self, needed: int) -> None:
        while len(self._held) > max(self.room, needed):
            self._held.popitem(last=False)


class ReferencePolicy:
    """k3 KL needs log pi_ref of every trained token (docs/method.md 1.1); a cache keyed by
    trajectory serves replays.

    ``source`` names what the model is loaded from (see ``ReferenceCache``)."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: str,
        device: torch.device,
        cached: int,
        sequence: SequenceGroup | None = None,
        source: str = "",
    ) -> None:
        self.policy = Policy(load_model(path, dtype=dtype, device=device), sequence)
        self.policy.requires_grad_(False)
        self.device = device
        self.cache = ReferenceCache(cached, source)

    def prepare(
        self, ids: Sequence[Sequence[str]], plan: Sequence[Pending], spare: Pending
    ) -> None:
        """Told of an update's micro-batches, and of the ids of their trajectories, before its first
        backward. Collective; ``spare`` stands in for a micro-batch that a rank lacks."""

    @torch.no_grad()
    def logprobs(self, ids: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """(B, T) reference log-probabilities of a micro-batch's tokens, 0 where padded."""
        keys = [_key(name, row) for name, row in zip(ids, rows, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in self.cache]
        if missing:
            batch = collate([rows[i] for i in missing])
            scores = self.policy(self.policy.placed(batch, self.device)).logprobs.cpu().numpy()
            for row, i in zip(scores, missing, strict=True):
                self.cache.note(keys[i], row[: len(rows[i].token_ids)])
        self.cache.use(keys)
        result = padded([self.cache[key] for key in keys])
        if missing:
            self.cache.forget_bad()
        return result.to(self.device)


class JointReference(ReferencePolicy):
    """A reference that ranks score together: the trained policy with its adapter off, which is no
    second model, or one whose weights are split over the ranks.

    All that an update needs is computed before its first backward: the policy cannot be its own
    base between a forward and its backward, and ranks lack different trajectories.
    """

    def __init__(
        self,
        score: Score,
        *,
        device: torch.device,
        cached: int,
        policy: Policy | None = None,
        source: str = "",
    ) -> None:
        self.score, self.device = score, device
        if policy is not None:  # a second model, which leaves the device with the first
            self.policy = policy
        self.cache = ReferenceCache(cached, source)

    def prepare(
        self, ids: Sequence[Sequence[str]], plan: Sequence[Pending], spare: Pending
    ) -> None:
        """Compute what the cache lacks, of a micro-batch the missing rows only. Collective under
        ZeRO 3."""
        self.cache.forget_bad()
        keyed = [
            [(_key(name, row), row) for name, row in zip(names, batch.rows, strict=True)]
            for names, batch in zip(ids, plan, strict=True)
        ]
        lacking = [[(key, row) for key, row in some if key not in self.cache] for some in keyed]
        missing = [some for some in lacking if some]
        batches = [Pending([row for _, row in some]) for some in missing]
        for number, output in self.score(batches, spare, [True] * len(batches)):
            scored = output.logprobs.cpu().numpy()
            for (key, row), values in zip(missing[number], scored, strict=True):
                self.cache.note(key, values[: len(row.token_ids)])
        self.cache.use([key for some in keyed for key, _ in some])

    def logprobs(self, ids: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """(B, T) of what ``prepare`` was told of, 0 where padded."""
        keys = [_key(name, row) for name, row in zip(ids, rows, strict=True)]
        return padded([self.cache[key] for key in keys]).to(self.device)
