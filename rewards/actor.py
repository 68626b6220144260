"""The reward actor: a suite behind one method. The cluster makes it a Ray actor; nothing here knows
of Ray."""

from __future__ import annotations

import asyncio
import time

from avatar_rl.rewards.config import RewardConfig
from avatar_rl.rewards.judges.base import Attach
from avatar_rl.rewards.record import ScoredGroup, ScoreRequest
from avatar_rl.rewards.suite import RewardSuite


class RewardActor:
    """Scores many groups at once. All methods are coroutines, so a Ray actor of it runs calls
    concurrently."""

    def __init__(self, config: RewardConfig, attach: Attach | None = None) -> None:
        self._suite = RewardSuite(config, attach)

    async def check(self) -> None:
        """Raises ResourceError or ConfigError if a judge endpoint cannot be used; call it before
        training starts."""
        await self._suite.check()

    async def score(self, requests: list[ScoreRequest]) -> list[ScoredGroup]:
        """Score each group, all concurrently; the answer keeps the order of the requests."""
        return list(await asyncio.gather(*(self._score_one(request) for request in requests)))

    async def stats(self) -> dict[str, float]:
        """Running totals by component (see RewardSuite.stats)."""
        return self._suite.stats()

    async def close(self) -> None:
        """Release the judge's connections."""
        await self._suite.aclose()

    async def _score_one(self, request: ScoreRequest) -> ScoredGroup:
        started = time.monotonic()
        scored = await self._suite.ascore(request)
        return ScoredGroup(
            prompt_id=request.prompt.id, scored=scored, seconds=time.monotonic() - started
        )
