"""The judge as a reward component: mean of four criteria per completion (docs/method.md 1.5)."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from avatar_rl.common.errors import AvatarError
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.format import extract_answer, think_text
from avatar_rl.rewards.judges.base import CRITERIA, Attach, ContentPart, Judge, names_scores
from avatar_rl.rewards.record import Completion, Mark, ScoreRequest

log = logging.getLogger(__name__)


class JudgeComponent:
    """The judge as a reward component: mean of the four criteria, None where the judge failed."""

    name = "judge"

    def __init__(self, judge: Judge, attach: Attach | None = None) -> None:
        self._judge = judge
        self._attach = attach
        self.counts: Counter[str] = Counter()

    async def score(self, request: ScoreRequest) -> list[Mark]:
        media: Sequence[ContentPart] = ()
        if self._attach is not None:
            try:
                media = await asyncio.to_thread(self._attach, request.prompt)
            except (AvatarError, OSError) as error:
                if not self.counts["media_failed"]:
                    log.warning(
                        "judge: media of prompt %s cannot be shown, group masked: %s",
                        request.prompt.id,
                        error,
                    )
                self.counts["media_failed"] += 1
                return [Mark(None)] * len(request.completions)
        marks = (
            self._mark(request.prompt, completion, media) for completion in request.completions
        )
        return list(await asyncio.gather(*marks))

    async def _mark(
        self, prompt: Prompt, completion: Completion, media: Sequence[ContentPart]
    ) -> Mark:
        think, answer = think_text(completion.text), extract_answer(completion.text) or ""
        nothing_said = not think and not answer
        if nothing_said or names_scores(completion.text, CRITERIA):
            return Mark(0.0, dict.fromkeys(CRITERIA, 0.0))  # a verdict, not a failure
        verdict = await self._judge.verdict(prompt, think, answer, media)
        return (
            Mark(None)
            if verdict is None
            else Mark(sum(verdict[key] for key in CRITERIA) / len(CRITERIA), verdict)
        )
