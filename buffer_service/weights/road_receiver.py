"""A rollout actor's view of the roads: it hears of each version where its workers hold it, and
takes from the board what they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from torch import Tensor

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.news import Noticeboard
from avatar_rl.buffer_service.weights.receiver import WeightReceiver, is_committed

WAIT_S = 0.2  # for news, before the caller is asked whether to continue


class HeldWeights(NamedTuple):
    """A committed version that the engine's workers hold in their own memory."""

    token: str


Update: TypeAlias = "tuple[int, dict[str, Tensor] | HeldWeights]"


class RoadReceiver:
    """Follows what is sealed. ``members``: the names of the engine's workers."""

    def __init__(self, notices: Noticeboard, board: WeightReceiver, members: set[str]) -> None:
        self.notices, self.board, self.members = notices, board, members
        self.by_road = 0  # versions that came by the group

    @property
    def refused(self) -> int:
        """Versions that were damaged."""
        return self.board.refused

    @property
    def version(self) -> int:
        """The newest that was handed on."""
        return self.board.version

    @version.setter
    def version(self, version: int) -> None:
        self.board.version = version

    def updates(self, buffer: ReplayBuffer, running: Callable[[], bool]) -> Iterator[Update]:
        """Committed versions; ends once ``running`` is false. Raises what ``WeightReceiver.fetch``
        does."""
        self.notices.news(0.001)  # from here on
        while running():
            sealed = self.notices.sealed()
            if sealed is None or sealed.version <= self.version:
                self.notices.news(WAIT_S)  # whatever comes: look again
            elif self.members <= set(sealed.members):
                # Sealed anew by another learner meanwhile: then that is what was committed.
                if (
                    is_committed(buffer, sealed.version, running)
                    and self.notices.sealed() == sealed
                ):
                    self.version = sealed.version
                    self.by_road += 1
                    yield sealed.version, HeldWeights(sealed.token)
            elif (update := self.board.next_update(buffer, running)) is not None:
                yield update
                del update
