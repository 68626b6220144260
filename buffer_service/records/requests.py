"""What is asked for, who works on it, and the receipts of the replay buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from avatar_rl.buffer_service.records.trajectory import Group

Tier = Literal["hard", "medium", "easy"]
TIERS: tuple[Tier, ...] = ("hard", "medium", "easy")


class RolloutRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the prompt stream: generate a group for this prompt."""

    seq: int  # position in the stream, < 1e8; orders groups
    prompt_id: str
    step: int  # learner step that trains on it (train requests)
    n: int  # completions to generate
    epoch: int = 0  # pass over the data set
    kind: Literal["train", "eval"] = "train"
    round: int = 0  # evaluation round (eval requests)
    min_version: int = 0  # oldest policy version that may generate it
    # prompts to ask instead, one after the other, when a group teaches nothing (dynamic sampling);
    # each takes the next seq
    spares: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the request in the buffer; equal keys are the same request."""
        return f"t:{self.seq:08d}" if self.kind == "train" else f"e:{self.round:06d}:{self.seq:08d}"


class RequestLease(msgspec.Struct, frozen=True, kw_only=True):
    """A request held by one consumer until it expires."""

    request: RolloutRequest
    attempt: int  # 1 for the first consumer; proves which lease it is
    consumer: str
    hinted: bool  # put the hint in context (docs/method.md 1.4)


class StoredRequest(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A request as Redis keeps it; ``request`` of scripts/parts/requests.lua reads the same."""

    prompt_id: str
    step: int
    epoch: int
    kind: Literal["train", "eval"]
    round: int
    n: int
    min_version: int
    seq: int
    attempt: int = 0
    consumer: str = ""
    spares: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: RolloutRequest) -> StoredRequest:
        """``request`` before its first lease."""
        return cls(
            prompt_id=request.prompt_id,
            step=request.step,
            epoch=request.epoch,
            kind=request.kind,
            round=request.round,
            n=request.n,
            min_version=request.min_version,
            seq=request.seq,
            spares=request.spares,
        )

    @property
    def request(self) -> RolloutRequest:
        return RolloutRequest(
            seq=self.seq,
            prompt_id=self.prompt_id,
            step=self.step,
            n=self.n,
            epoch=self.epoch,
            kind=self.kind,
            round=self.round,
            min_version=self.min_version,
            spares=self.spares,
        )

    def lease(self, hinted: bool) -> RequestLease:
        """The newest lease of it."""
        return RequestLease(
            request=self.request, attempt=self.attempt, consumer=self.consumer, hinted=hinted
        )


class NewGroup(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What insert.lua must know of a group at once."""

    id: str
    seq: int
    step: int
    prompt_id: str
    hinted: bool
    tokens: int
    request: str  # key
    bound: int
    imported: bool  # from a file, without a request
    rewards: list[float]
    marks: str  # see accuracy_marks
    counted: str  # "0" where the reward rests on an imputed mark, else "1"
    replace: bool = False  # ask the request's next spare prompt beside it


class PromptKl(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What one step measured of a prompt's KL to the behaviour policy; kl.lua reads the same."""

    prompt_id: str
    k3: float  # sum over the tokens of its fresh and replayed trajectories, each capped
    tokens: int
    fresh: bool  # the step trained fresh trajectories of it: a visit


class GroupState(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A fresh group as Redis keeps it; ``group`` of scripts/parts/groups.lua reads the same."""

    prompt_id: str
    step: int
    hinted: bool
    n: int
    zero: int  # see zero_accuracy
    successes: list[int]
    versions: list[int]
    advantages: list[float] = []  # see ``advantages_of``; none in states of older releases


def advantages_of(rewards: Sequence[float]) -> list[float]:
    """(R - mean) / (deviation + 1e-4) over a group (docs/method.md 1.1), what strategy ``priority``
    goes by. All 0 for a group of one."""
    mean = sum(rewards) / len(rewards)
    squares = sum((reward - mean) ** 2 for reward in rewards)
    deviation = math.sqrt(squares / (len(rewards) - 1)) if len(rewards) > 1 else 0.0
    return [(reward - mean) / (deviation + 1e-4) for reward in rewards]


class InsertReceipt(msgspec.Struct, frozen=True):
    """What became of a group. "late": replay only; "duplicate": it was stored before, nothing
    changed."""

    status: Literal["fresh", "late", "duplicate"]
    evicted: int


class FreshShare(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's groups of one step in seq order, all or none."""

    groups: list[Group]
    ready: bool  # the whole step has arrived
    missing: int  # groups still to come (1 at least while not ready)
    expected: int  # groups of the whole step over all ranks; -1 while no request of it was pushed


class CommitReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a commit did; ``committed`` is False when the step had been acknowledged before."""

    committed: bool
    version: int
    trained: int  # groups
    replay_only: int  # groups of this or an earlier step that were not trained
    evicted: int  # trajectories


class EvalResults(msgspec.Struct, frozen=True, kw_only=True):
    """Payloads of an evaluation round by request seq."""

    complete: bool
    missing: int
    payloads: dict[int, bytes]


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Groups by what became of them.

    It balances: generated = trained_fresh + replay_only + dropped + in_flight."""

    generated: int
    trained_fresh: int
    replay_only: int
    dropped: dict[str, int]
    in_flight: int
    duplicates: int  # inserts that changed nothing
    completions: int  # accepted completions
    tokens: int  # generated tokens, as the actors reported them
    evicted: int  # trajectories removed for capacity

    @property
    def gap(self) -> int:
        """Groups unaccounted for, 0 when it balances."""
        return (
            self.generated
            - self.trained_fresh
            - self.replay_only
            - sum(self.dropped.values())
            - self.in_flight
        )
