"""What the reward actors say of their judge, asked between steps and never waited for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)
#: What is shown of each reward actor's totals, summed over the actors.
SHOWN = ("judge/breaker_open", "judge/unscored")


class JudgeStates:
    """Metrics of the judge by the reward actors' own totals, those of the step before."""

    def __init__(self, scorers: Sequence[ActorHandle]) -> None:
        self._scorers = scorers
        self._asked: list[ray.ObjectRef[dict[str, float]]] = []
        self._last: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """The newest that all have said; empty until they have. An actor that died is asked
        again."""
        import ray

        if self._asked:
            ready, waiting = ray.wait(self._asked, num_returns=len(self._asked), timeout=0)
            if waiting:
                return self._last
            self._asked = []
            try:
                totals = ray.get(ready)
            except ray.exceptions.RayError as error:
                log.info("a reward actor did not say its totals: %s", error)
            else:
                self._last = {name: sum(one.get(name, 0.0) for one in totals) for name in SHOWN}
        self._asked = [scorer.stats.remote() for scorer in self._scorers]
        return self._last
