"""The reward actor: joins the prompts to the reward suite and scores whole groups.

The cluster makes it a Ray actor; nothing here knows of Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.common.errors import AvatarError
from avatar_rl.common.scoring import CompletionScore, UnscoredGroup
from avatar_rl.prompts.config import DataConfig, MediaConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.rewards.config import RewardConfig
from avatar_rl.rewards.judges.attachments import MediaAttach
from avatar_rl.rewards.record import ScoreRequest
from avatar_rl.rewards.suite import RewardSuite


class RewardActor:
    """Scores many groups at once.

    Its methods are coroutines, so that a Ray actor of it runs calls concurrently. Raises as
    ``RewardSuite`` and ``PromptIndex.read`` do.
    """

    def __init__(
        self,
        config: RewardConfig,
        datasets: Sequence[Path],
        data: DataConfig,
        media: MediaConfig | None = None,
    ) -> None:
        self.prompts = PromptIndex.read(datasets, data)
        judge = config.judge
        attach = None
        if judge.attach and config.asks_judge:
            attach = MediaAttach(media or MediaConfig(), judge.attach, frames=judge.attach_frames)
        self.suite = RewardSuite(config, attach)

    async def check(self) -> None:
        """Raises ResourceError or ConfigError when a judge cannot be reached; call it before any
        training."""
        await self.suite.check()

    async def stats(self) -> dict[str, float]:
        """Running totals of its suite, and the state of the judge's circuit breaker."""
        return self.suite.stats()

    async def score(
        self, groups: Sequence[UnscoredGroup]
    ) -> list[list[CompletionScore] | AvatarError]:
        """Score all groups concurrently; the answers keep their order.

        Per group: a score for each completion, or the reason why this group cannot be scored. That
        reason does not concern the other groups. Raises what is not an AvatarError.
        """
        answers: list[list[CompletionScore] | AvatarError] = []
        for answer in await asyncio.gather(
            *(self._score(group) for group in groups), return_exceptions=True
        ):
            if isinstance(answer, BaseException) and not isinstance(answer, AvatarError):
                raise answer
            answers.append(answer)
        return answers

    async def _score(self, group: UnscoredGroup) -> list[CompletionScore]:
        request = ScoreRequest(
            prompt=self.prompts[group.prompt_id],
            completions=group.completions,
            video_only=group.video_only,
            audio_only=group.audio_only,
            opened_tag=group.opened_tag,
        )
        return [
            CompletionScore(
                reward=one.reward,
                imputed=one.imputed,
                components=one.components,
                details=one.details,
            )
            for one in await self.suite.ascore(request)
        ]


def check_judge(config: RewardConfig) -> None:
    """Ask the judge's endpoint for its models before any process is started.

    Does nothing when the rewards ask no endpoint. Raises ResourceError or ConfigError that names
    the endpoint, key or model at fault.
    """
    if not config.asks_judge or config.judge.kind != "openai":
        return
    suite = RewardSuite(config, attach=lambda prompt: ())

    async def ask() -> None:
        try:
            await suite.check()
        finally:
            await suite.aclose()

    asyncio.run(ask())
