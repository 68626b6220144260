"""A leased prompt on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avatar_rl.actors.unimodal import WHOLE
from avatar_rl.prompts.record import Prompt

if TYPE_CHECKING:
    from avatar_rl.actors.engine.engine import FinishedRequest
    from avatar_rl.buffer_service.records.requests import RequestLease


@dataclass
class PendingGroup:
    """One request to the engine for the prompt, and one for each of its unimodal parts that the
    rewards ask for."""

    lease: RequestLease
    prompt: Prompt
    prepared: dict[str, Any]  # by part, RolloutEngine.prepare; the whole prompt first
    finished: dict[str, FinishedRequest] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """Completions that the engine generates for it."""
        return self.lease.request.n * len(self.prepared)

    @property
    def done(self) -> bool:
        return self.finished.keys() == self.prepared.keys()

    @property
    def whole(self) -> FinishedRequest:
        """What is trained on. Raises KeyError before it is finished."""
        return self.finished[WHOLE]

    @property
    def tokens(self) -> int:
        """Generated for it, those of the unimodal parts included."""
        return sum(
            len(one.token_ids) for request in self.finished.values() for one in request.completions
        )

    def request_id(self, part: str) -> str:
        return f"{self.lease.request.key}/{part}"

    @property
    def request_ids(self) -> list[str]:
        return [self.request_id(part) for part in self.prepared]


def read_request_id(request_id: str) -> tuple[str, str]:
    """(request key, part) of ``Work.request_id``."""
    key, _, part = request_id.partition("/")
    return key, part
