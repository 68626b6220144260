"""The way of finished groups from the engine through the reward actor into the buffer."""

from __future__ import annotations

import json
import logging
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from avatar_rl.actors.groups import (
    PendingGroup,
    UnusableGroupError,
    evaluation_payload,
    is_dead,
    make_group,
)
from avatar_rl.actors.shared_state import SharedState
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.common.errors import AvatarError
from avatar_rl.common.scoring import CompletionScore, UnscoredGroup

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.buffer_service.store import ReplayBuffer

log = logging.getLogger(__name__)

Answer: TypeAlias = list[CompletionScore] | BaseException


@dataclass(frozen=True)
class ScoredGroup:
    """A finished group and what the reward actor said of it."""

    pending: PendingGroup
    answer: Answer


class ScoringLoop:
    """One thread calls ``run``. ``put`` hands it a finished group; ``close`` says that no more will
    come."""

    def __init__(
        self,
        spec: RolloutSpec,
        buffer: ReplayBuffer,
        scorer: ActorHandle | None,
        state: SharedState,
    ) -> None:
        """``scorer`` is a reward actor: ``score.remote(unscored groups)`` gives its answers. None
        where only evaluations are asked and whoever asked marks them."""
        self.spec, self.buffer, self.scorer, self.state = spec, buffer, scorer, state
        self._queue: SimpleQueue[PendingGroup | ScoredGroup | None] = SimpleQueue()  # None: closed

    def put(self, group: PendingGroup) -> None:
        """Have a finished group scored and delivered."""
        self._queue.put(group)

    def close(self) -> None:
        """End ``run`` once all groups that were ``put`` are settled."""
        self._queue.put(None)

    def run(self) -> None:
        """Have groups scored, many at a time, and insert each as its scores arrive.

        Returns when ``close`` was called and all groups are settled; at once when the actor is
        broken. Raises what a reward actor raised that is no AvatarError.
        """
        scoring, closed = 0, False
        while scoring or not closed:
            items = self._waiting()
            if None in items:
                if self.state.failure is not None:
                    return
                closed = True
            scored = [item for item in items if isinstance(item, ScoredGroup)]
            # From here on their scores may come at any moment, through the queue.
            scoring += self._ask([item for item in items if isinstance(item, PendingGroup)])
            scoring -= len(scored)
            for group in scored:
                self._deliver(group)

    def give_up(self, lease: RequestLease, error: AvatarError) -> None:
        """Quarantine a prompt that cannot be asked or scored, with the reason; the run continues.

        For any thread.
        """
        log.warning("prompt %s quarantined: %s", lease.request.prompt_id, error)
        self.buffer.requests.quarantine(lease, reason=type(error).__name__, detail=str(error))
        self.state.settle(lease.request.key, None)

    def _waiting(self) -> list[PendingGroup | ScoredGroup | None]:
        items = [self._queue.get()]
        with suppress(Empty):
            while True:
                items.append(self._queue.get_nowait())
        return items

    def _ask(self, groups: list[PendingGroup]) -> int:
        """Send groups to the reward actor; returns how many.

        A call costs the engine's thread about a millisecond. So groups share one, unless they would
        have to wait for each other's judge.
        """
        asked: list[tuple[PendingGroup, UnscoredGroup]] = []
        for group in groups:
            try:
                asked.append((group, group.unscored()))
            except AvatarError as error:
                self.give_up(group.lease, error)
        if self.scorer is None:
            for group, _ in asked:
                self._deliver(ScoredGroup(group, []))
            return 0
        together = max(1, len(asked)) if self.spec.scores_together else 1
        for first in range(0, len(asked), together):
            part = asked[first : first + together]
            answers: Future[list[Answer]] = self.scorer.score.remote(
                [unscored for _, unscored in part]
            ).future()
            answers.add_done_callback(partial(self._scored, [group for group, _ in part]))
        return len(asked)

    def _scored(self, groups: list[PendingGroup], answers: Future[list[Answer]]) -> None:
        """Called by a thread of Ray's."""
        error = answers.exception()
        found = [error] * len(groups) if error else answers.result()
        for group, answer in zip(groups, found, strict=True):
            self._queue.put(ScoredGroup(group, answer))

    def _deliver(self, scored: ScoredGroup) -> None:
        group, scores = scored.pending, scored.answer
        lease = group.lease
        if isinstance(scores, AvatarError):
            self.give_up(lease, scores)
            return
        if isinstance(scores, BaseException):
            raise scores
        if lease.request.kind == "eval":
            payload = evaluation_payload(group.prompt, group.whole, scores)
            self.buffer.requests.add_eval(lease, json.dumps(payload).encode())
        else:
            temperature = self.spec.sampling.temperature
            try:
                stored = make_group(group.whole, lease, scores, temperature=temperature)
            except UnusableGroupError as error:
                log.warning("%s: dropped, its prompt stays", error)
                self.buffer.requests.drop(lease, error.reason)
                self.state.settle(group.key, None)
                return
            self.buffer.requests.add_group(
                stored,
                lease,
                tokens_generated=group.tokens,
                replace=bool(lease.request.spares) and is_dead(stored, self.spec.dead_by),
            )
        self.state.settle(group.key, group.tokens)
