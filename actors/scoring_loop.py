"""The way of finished groups from the engine through the scorer into the buffer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from avatar_rl.actors.groups import (
    Scores,
    UnusableGroupError,
    completion_facts,
    evaluation_payload,
    make_group,
)
from avatar_rl.actors.pending_group import PendingGroup
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.actors.unimodal import WHOLE
from avatar_rl.common.errors import AvatarError

if TYPE_CHECKING:
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.buffer_service.store import ReplayBuffer

log = logging.getLogger(__name__)

Answer = Scores | BaseException


@dataclass
class ScoredGroup:
    """A finished group on its way through the scorer."""

    work: PendingGroup
    scores: Answer | None = None  # None until they have come


class ScoringLoop:
    """``run`` in a thread of its own; ``put`` hands it a finished group, ``close`` says that none
    will follow."""

    def __init__(
        self,
        spec: RolloutSpec,
        buffer: ReplayBuffer,
        scorer: Any,
        settled: Callable[[str, int | None], None],
    ) -> None:
        """``settled(request key, tokens)`` is told of every group that leaves our hands; None: not
        inserted."""
        self.spec, self.buffer, self.scorer, self._settled = spec, buffer, scorer, settled
        self._outcomes: SimpleQueue[ScoredGroup | None] = SimpleQueue()  # None: no more will come

    def put(self, work: PendingGroup) -> None:
        self._outcomes.put(ScoredGroup(work))

    def close(self) -> None:
        self._outcomes.put(None)

    def run(self, failed: Callable[[], bool]) -> None:
        """Have groups scored, many at a time, and insert each as its scores arrive, until all that
        were ``put`` before ``close`` are settled; at once if the actor ``failed``."""
        scoring, closed = 0, False
        while scoring or not closed:
            items = self._waiting()
            if None in items:
                if failed():
                    return
                closed = True
            outcomes = [item for item in items if item is not None]
            new = [outcome for outcome in outcomes if outcome.scores is None]
            scored = [outcome for outcome in outcomes if outcome.scores is not None]
            self._ask(new)  # from here on their scores may come at any moment, through the queue
            scoring += len(new) - len(scored)
            for outcome in scored:
                self._insert(outcome)

    def _waiting(self) -> list[ScoredGroup | None]:
        items = [self._outcomes.get()]
        with suppress(Empty):
            while True:
                items.append(self._outcomes.get_nowait())
        return items

    def _ask(self, outcomes: list[ScoredGroup]) -> None:
        """A call costs the engine's thread about a millisecond, so groups share one unless they
        would have to wait for each other's judge."""
        together = max(1, len(outcomes)) if self.spec.scores_together else 1
        for first in range(0, len(outcomes), together):
            part = outcomes[first : first + together]
            groups = [asked(outcome.work) for outcome in part]
            future: Future[list[Answer]] = self.scorer.score.remote(groups).future()
            future.add_done_callback(partial(self._scored, part))

    def _scored(self, outcomes: list[ScoredGroup], answer: Future[list[Answer]]) -> None:
        error = answer.exception()
        answers: Sequence[Answer] = [error] * len(outcomes) if error else answer.result()
        for outcome, scores in zip(outcomes, answers, strict=True):
            outcome.scores = scores
            self._outcomes.put(outcome)

    def _insert(self, outcome: ScoredGroup) -> None:
        finished, lease, scores = outcome.work.whole, outcome.work.lease, outcome.scores
        if isinstance(scores, AvatarError):
            quarantine(self.buffer, lease, scores)
            self._settled(lease.request.key, None)
            return
        if isinstance(scores, BaseException):
            raise scores
        assert scores is not None
        generated = outcome.work.tokens
        if lease.request.kind == "eval":
            payload = evaluation_payload(outcome.work.prompt, finished, scores)
            self.buffer.requests.add_eval(lease, json.dumps(payload).encode())
        else:
            try:
                group = make_group(
                    finished, lease, scores, temperature=self.spec.sampling.temperature
                )
            except UnusableGroupError as error:
                log.warning("%s: dropped, its prompt stays", error)
                self.buffer.requests.drop(lease, error.reason)
                self._settled(lease.request.key, None)
                return
            self.buffer.requests.add_group(group, lease, tokens_generated=generated)
        self._settled(lease.request.key, generated)


def asked(work: PendingGroup) -> tuple[Any, ...]:
    """One group as the scorer takes it: prompt id, facts of its completions and, where there are
    any, those of its unimodal parts by name."""
    facts = {part: completion_facts(request) for part, request in work.finished.items()}
    whole = facts.pop(WHOLE)
    return (work.prompt.id, whole, facts) if facts else (work.prompt.id, whole)


def quarantine(buffer: ReplayBuffer, lease: RequestLease, error: AvatarError) -> None:
    """A prompt that cannot be asked or scored is set aside with its reason; the run goes on."""
    log.warning("prompt %s quarantined: %s", lease.request.prompt_id, error)
    buffer.requests.quarantine(lease, reason=type(error).__name__, detail=str(error))
