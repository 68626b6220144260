"""The learner rank as Ray knows it: who only holds a handle (the driver, the weight store) need not
import torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avatar_rl.common.process import no_collections
from avatar_rl.learner.spec import LearnerSpec

#: Methods of ``avatar_rl.learner.rank.LearnerRank`` that are called from outside.
METHODS = (
    "progress",
    "meeting_point",
    "setup",
    "sft",
    "probe",
    "train_step",
    "export",
    "hold",
    "capture_state",
    "write_state",
    "restore_state",
    "publish_again",
)


class LearnerRankActor:
    """Plain class; the cluster makes it a Ray actor. Ray imports the class of every handle it is
    given, so this one is light and makes the real rank in its own process."""

    @no_collections()
    def __init__(
        self, spec: LearnerSpec, rank: int, ranks: int, weight_store: Any, state_replica: Any = None
    ) -> None:
        from avatar_rl.learner.rank import LearnerRank

        self.learner = LearnerRank(spec, rank, ranks, weight_store, state_replica)
        self.outbox = self.learner.outbox  # for the weight store's standing call


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: LearnerRankActor, *arguments: Any, **named: Any) -> Any:
        return getattr(self.learner, name)(*arguments, **named)

    method.__name__ = name
    return method


for _name in METHODS:
    setattr(LearnerRankActor, _name, _passed_on(_name))
