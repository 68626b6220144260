"""The reward pool as rollout actors see it: plain facts in, plain scores out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avatar_rl.common.errors import AvatarError
from avatar_rl.prompts.config import DataConfig, MediaConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.rewards.actor import RewardActor
from avatar_rl.rewards.config import RewardConfig
from avatar_rl.rewards.judges.attachments import MediaAttach
from avatar_rl.rewards.record import Completion, ScoreRequest
from avatar_rl.rewards.suite import RewardSuite

Facts = tuple[str, bool, float, int]  # text, finished, mean log-probability, tokens
Scores = list[
    tuple[float | None, dict[str, float | None]]
]  # see actors.group, which shares no code with us


class Scorer:
    """Joins the prompt records to the reward suite. Made an async Ray actor by the pool."""

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
        self.rewards = RewardActor(config, attach)

    async def check(self) -> None:
        """Raises when a judge cannot be reached, before any training."""
        await self.rewards.check()

    async def score(self, groups: list[tuple[Any, ...]]) -> list[Scores | AvatarError]:
        """For each (prompt id, facts of its completions[, facts of those to video and to audio
        alone]): reward and components per completion, None where masked; or why this group cannot
        be scored, which is no matter of the others."""
        answers: list[Scores | AvatarError] = []
        for answer in await asyncio.gather(
            *(self._score(*group) for group in groups), return_exceptions=True
        ):
            if isinstance(answer, BaseException) and not isinstance(answer, AvatarError):
                raise answer
            answers.append(answer)
        return answers

    async def _score(
        self, prompt_id: str, facts: list[Facts], unimodal: Mapping[str, list[Facts]] | None = None
    ) -> Scores:
        parts = {f"{part}_only": _completions(facts) for part, facts in (unimodal or {}).items()}
        request = ScoreRequest(
            prompt=self.prompts[prompt_id], completions=_completions(facts), **parts
        )
        [group] = await self.rewards.score([request])
        return [(item.reward, item.components) for item in group.scored]

    async def stats(self) -> dict[str, float]:
        return await self.rewards.stats()


def _completions(facts: list[Facts]) -> list[Completion]:
    return [
        Completion(text=text, finished=finished, mean_logprob=mean_logprob, tokens=tokens)
        for text, finished, mean_logprob, tokens in facts
    ]


def check_judge(config: RewardConfig) -> None:
    """Ask the judge's endpoint for its models before a process is started; nothing to ask without
    one.

    Raises ResourceError or ConfigError naming the endpoint, key or model at fault.
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
