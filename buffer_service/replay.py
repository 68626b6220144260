"""The learner's side: fresh groups of a step, replayed trajectories, baselines, the commit."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from redis.client import Pipeline

from avatar_rl.buffer_service.config import BY_ADVANTAGE, DEFAULT_LEASE_S, Strategy
from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.codec import decode
from avatar_rl.buffer_service.records.requests import (
    TIERS,
    CommitReceipt,
    FreshShare,
    PromptKl,
    Tier,
)
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.records.validate import trajectory_id
from avatar_rl.buffer_service.redis.connection import Connection, Take
from avatar_rl.buffer_service.redis.scripting import UNCHECKED
from avatar_rl.buffer_service.redis.wire import Meanwhile, Word
from avatar_rl.common.errors import ReplayBufferError

log = logging.getLogger(__name__)

T = TypeVar("T")
FIXED = 1 << 28  # Rbar is a multiple of 1 / FIXED; their sum over prompts is kept as an integer
_DRAWS = 8  # a removed value lingers for 10 s; a client that stood still for longer draws again
_DAMAGED = 8  # bad records that one call skips; more are no accident


class _Averages(msgspec.Struct, array_like=True, frozen=True):
    """The head of a prompt's statistics (scripts/parts/prompts.lua); False: no visit yet."""

    rbar: float | bool
    hinted_rbar: float | bool


_averages = msgspec.msgpack.Decoder(_Averages).decode


def seed_state(seed: int, step: int) -> tuple[int, int]:
    """Start state of the generator of a draw (scripts/parts/random.lua). Hashing keeps neighbouring
    seeds unrelated."""
    digest = hashlib.sha256(f"avatar-draw:{seed}:{step}".encode()).digest()
    x, y = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
    return 1 + x % 2147483562, 1 + y % 2147483398


def _checked(share: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= share[0] < share[1]:
        raise ReplayBufferError(f"share {share}: needs 0 <= rank < world")
    return share


class ReplayStock:
    """Fresh groups and the replayable stock. A group becomes replayable when its step is committed:
    nothing is replayed in the step that it was generated for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._run = connection.run

    def _values(self, ids: Sequence[str]) -> tuple[list[Trajectory], str | None]:
        """The records of ``ids``, and the first id whose record is gone. Raises RecordError."""
        connection = self._connection
        return self._taken(lambda take: connection.read_values(ids, take)) if ids else ([], None)

    def _taken(self, read: Callable[[Take], object]) -> tuple[list[Trajectory], str | None]:
        """The records of the values that ``read`` hands out, and the first id whose record is
        gone."""

        def once() -> tuple[list[Trajectory], str | None]:
            records: list[Trajectory] = []
            gone: list[str] = []

            def take(part: Sequence[str], values: list[bytes | None]) -> None:
                for tid, data in zip(part, values, strict=True):
                    if data is None:
                        gone.append(tid)
                        continue
                    try:
                        record = decode(data, tid)
                        if record.id != tid:
                            raise RecordError(
                                f"trajectory {tid}: the record under its name is of {record.id}"
                            )
                    except RecordError as error:
                        raise self._quarantined(tid, error) from error
                    records.append(record)

            read(take)
            return records, gone[0] if gone else None

        return self._connection.attempt(once)

    @staticmethod
    def _despite_damage(ask: Callable[[], T]) -> T:
        """Calls ``ask``, and again after a bad record, which is in quarantine by then. Raises
        RecordError after too many."""
        for _ in range(_DAMAGED):
            try:
                return ask()
            except RecordError as error:
                log.warning("%s (it is asked again)", error)
        return ask()

    def _quarantined(self, tid: str, error: RecordError) -> RecordError:
        """Lists a bad record and takes it out of the buffer; returns the error to raise."""
        self._run("corrupt", tid, str(error))
        return RecordError(f"{error}; it was put in quarantine, ask again")

    def _gone(self, tid: str) -> RecordError:
        error = RecordError(
            f"trajectory {tid}: its record is gone; was the namespace edited by hand?"
        )
        return self._quarantined(tid, error)

    def lease_fresh(
        self,
        consumer: str,
        step: int,
        share: tuple[int, int] = (0, 1),
        lease_s: float = DEFAULT_LEASE_S,
        fencing_token: int | None = None,
    ) -> FreshShare:
        """Groups of ``step`` in seq order, none until the whole step has arrived. O(groups).

        The same consumer gets the same groups when it asks again. A group with a damaged record is
        dropped.

        Args:
            share: (rank, world) takes the groups rank, rank + world, ...
            fencing_token: of this learner; none is not checked.

        Raises StepTrainedError, FencedError (a newer token was taken), LeaseHeldError (another
        consumer has this share), RecordError (more than a few damaged records)."""
        rank, world = _checked(share)
        lease_ms = int(lease_s * 1000)
        ask = (
            consumer,
            step,
            rank,
            world,
            lease_ms,
            UNCHECKED if fencing_token is None else fencing_token,
        )
        return self._despite_damage(lambda: self._fresh(step, ask))

    def _fresh(self, step: int, ask: tuple[Word, ...]) -> FreshShare:
        reply = self._run("fresh", *ask)
        expected, arrived = int(reply[0]), int(reply[1])
        ready = expected >= 0 and arrived >= expected
        missing = 0 if ready else max(expected - arrived, 1)
        sizes = [(reply[i].decode(), int(reply[i + 1])) for i in range(2, len(reply), 2)]
        records, gone = self._values([trajectory_id(gid, i) for gid, n in sizes for i in range(n)])
        if gone is not None:
            raise self._gone(gone)
        groups, at = [], 0
        for gid, n in sizes:
            members = tuple(records[at : at + n])
            at += n
            groups.append(
                Group(
                    id=gid,
                    prompt_id=members[0].prompt_id,
                    seq=int(gid),
                    step=step,
                    hinted=members[0].hinted,
                    trajectories=members,
                )
            )
        return FreshShare(groups=groups, ready=ready, missing=missing, expected=expected)

    def draw(
        self,
        count: int,
        *,
        step: int,
        seed: int,
        strategy: Strategy | None = None,
        reward_diverse: bool | None = None,
        prompt_ids: Sequence[str] = (),
        version: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> list[Trajectory]:
        """Replayed trajectories for ``step``, none while fewer than ``warm_up`` are stored.
        O(count log N), of strategies ``priority`` and ``magnitude`` O(N).

        Equal contents, seed and step give equal draws. No trajectory comes twice unless the stock
        is smaller than ``count``, or the strategy is one of those two. Reuse is counted once per
        step, when it is committed. Damaged records leave the stock.

        Args:
            prompt_ids: over which strategy ``same_prompt`` spreads the count.
            version: the learner's, where it is ahead of the buffer's; bounds the age.
            share: (rank, world) takes those at rank, rank + world, ... of one common draw.

        Raises StepTrainedError, RecordError (more than a few damaged records)."""
        config = self._connection.config
        strategy = strategy or config.strategy
        diverse = config.reward_diverse if reward_diverse is None else reward_diverse
        if (
            count < 0
            or (strategy in ("recent", *BY_ADVANTAGE) and diverse)
            or (strategy in BY_ADVANTAGE and config.max_reuse)
            or (strategy == "same_prompt" and not prompt_ids)
        ):
            raise ReplayBufferError(
                f"draw: count {count}, strategy {strategy}, reward_diverse {diverse}, "
                f"{len(prompt_ids)} prompts; "
                "recent, priority and magnitude cannot be diverse, priority and magnitude go "
                "without max_reuse, "
                "same_prompt needs prompt_ids"
            )
        _checked(share)
        if count == 0:
            return []
        x, y = seed_state(seed, step)
        extra: tuple[Word, ...] = tuple(prompt_ids) if strategy == "same_prompt" else ()
        if strategy in BY_ADVANTAGE:
            extra = (repr(config.priority_temperature), repr(config.priority_half_life))
        ask = (count, step, x, y, strategy, int(diverse), version, seed, *share)
        listed = f"share:{seed}:{share[0]}"

        def read(take: Take) -> None:
            if not self._connection.draw_values(
                listed, math.ceil(count / share[1]), take, (*ask, 1, *extra)
            ):
                self._connection.read_values(
                    self._run("draw", *ask, 0, *extra).decode().split(), take
                )

        return self._despite_damage(lambda: self._drawn(read))

    def _drawn(self, read: Callable[[Take], object]) -> list[Trajectory]:
        last: str | None = None
        for _ in range(_DRAWS):
            records, gone = self._taken(read)
            if gone is None:
                return records
            if gone == last:
                break
            last = gone
        raise self._gone(str(last))

    def baselines(
        self, prompt_ids: Sequence[str], hinted: Sequence[bool] | None = None
    ) -> list[float]:
        """Rbar of each prompt, of its hinted visits where ``hinted`` (docs/method.md 1.1). A prompt
        without one gets the mean over all prompts. O(prompts).

        Raises ReplayBufferError before the first group."""
        if not prompt_ids:
            return []
        flags = [False] * len(prompt_ids) if hinted is None else hinted
        key = self._connection.key

        def ask(pipe: Pipeline) -> None:
            pipe.hmget(key("prompts"), list(prompt_ids))
            pipe.hget(key("meta"), "rbar_sum")
            pipe.zcard(key("rank"))

        states, total, seen = self._connection.together(ask)
        if not seen:
            raise ReplayBufferError("baselines: no prompt has been scored yet; add a group first")
        mean = int(total) / FIXED / seen
        values: list[float] = []
        for raw, flag in zip(states, flags, strict=True):
            found = _averages(raw) if raw else _Averages(False, False)
            rbar = found.hinted_rbar if flag else found.rbar
            values.append(mean if rbar is False else float(rbar))
        return values

    def averages(self, prompt_ids: Sequence[str]) -> dict[str, float]:
        """Rbar of those of the prompts that have one, hinted visits aside. O(prompts)."""
        if not prompt_ids:
            return {}
        key = self._connection.key("prompts")
        states = self._connection.attempt(
            lambda: self._connection.client.hmget(key, list(prompt_ids))
        )
        found = {
            pid: _averages(raw).rbar for pid, raw in zip(prompt_ids, states, strict=True) if raw
        }
        return {pid: float(rbar) for pid, rbar in found.items() if rbar is not False}

    def tiers(self, prompt_ids: Sequence[str]) -> list[Tier | None]:
        """The tier that each prompt's trajectories are in now; None for one that was never scored.
        O(prompts + log P)."""
        if not prompt_ids:
            return []
        return [
            TIERS[number - 1] if number else None for number in self._run("standing", *prompt_ids)
        ]

    def commit_step(
        self, step: int, new_version: int, group_ids: Sequence[str], fencing_token: int
    ) -> CommitReceipt:
        """Settles a trained step for all ranks at once. O(groups log N).

        All its groups become replayable. ``group_ids`` count as trained, the others as replay only.
        The policy version becomes ``new_version``. A repeat changes nothing.

        Raises FencedError, UnknownRequestError (a group that is not waiting), VersionError; then
        nothing changed."""
        done, version, trained, rest, evicted = self._run(
            "commit", step, new_version, fencing_token, *group_ids
        )
        return CommitReceipt(
            committed=bool(done),
            version=version,
            trained=trained,
            replay_only=rest,
            evicted=evicted,
        )

    def new_fencing_token(self) -> int:
        """A token for a new learner. Older tokens are refused from now on (FencedError)."""
        return int(self._run("fencing_token"))

    def version(self, meanwhile: Meanwhile = None) -> int:
        """Newest policy version. O(1). ``meanwhile`` runs while Redis answers; it runs again if the
        answer was lost."""
        found = self._connection.ask(
            "HGET", self._connection.key("meta"), "version", meanwhile=meanwhile
        )
        if found is None:
            raise ReplayBufferError(
                f"run {self._connection.run_id} is not set up; connect to it first"
            )
        return int(found)

    def publish_version(self, version: int, fencing_token: int | None = None) -> None:
        """Announces a policy version apart from a commit. Raises VersionError when it would go
        back."""
        self._run("publish", version, UNCHECKED if fencing_token is None else fencing_token)

    def report_behaviour_kl(self, step: int, found: Sequence[PromptKl]) -> bool:
        """KL of the current to the behaviour policy by prompt, of a trained step. O(prompts).

        It opens the hint gate of a prompt whose own KL is low (docs/method.md 1.4). False when
        this step or a later one was reported before: then nothing changed. Raises RecordError for
        a value that is not finite or without tokens.
        """
        for one in found:
            if not math.isfinite(one.k3) or one.tokens < 1:
                raise RecordError(
                    f"behaviour KL of prompt {one.prompt_id}: {one.k3} over {one.tokens} tokens; "
                    "report finite sums over one token at least"
                )
        return bool(self._run("kl", step, msgspec.msgpack.encode(found)))
