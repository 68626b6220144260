"""The judge reward: four criteria per completion, and who may score them (METHOD 1.5)."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from prompts.errors import AvatarError, ConfigError
from prompts.record import Prompt
from rewards.config import JudgeConfig
from rewards.format import extract_answer, think_text
from rewards.record import Completion, Mark, ScoreRequest

if TYPE_CHECKING:
    from rewards.segment_rewards import SegmentJudge

#: The keys of a verdict; each is scored in [0, 1] and the reward is their mean.
CRITERIA = ("audio_grounding_score", "visual_id_score", "location_acc_score", "caption_corr_score")

Verdict = dict[str, float]
ContentPart = Mapping[str, Any]
#: OpenAI content parts (image_url, input_audio) that show a prompt's media to the judge. May block: runs in a thread.
Attach = Callable[[Prompt], Sequence[ContentPart]]

log = logging.getLogger(__name__)


class Judge(Protocol):
    """Something that scores reasoning and answer by the four criteria. None means that it could not."""

    async def verdict(
        self, prompt: Prompt, think: str, answer: str, media: Sequence[ContentPart]
    ) -> Verdict | None: ...

    async def check(self) -> None: ...

    async def close(self) -> None: ...

    def stats(self) -> dict[str, float]: ...


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
                    log.warning("judge: media of prompt %s cannot be shown, group masked: %s", request.prompt.id, error)
                self.counts["media_failed"] += 1
                return [Mark(None)] * len(request.completions)
        marks = (self._mark(request.prompt, completion, media) for completion in request.completions)
        return list(await asyncio.gather(*marks))

    async def _mark(self, prompt: Prompt, completion: Completion, media: Sequence[ContentPart]) -> Mark:
        think, answer = think_text(completion.text), extract_answer(completion.text) or ""
        if not think and not answer:
            return Mark(0.0, dict.fromkeys(CRITERIA, 0.0))  # nothing was said: that is a verdict, not a failure
        verdict = await self._judge.verdict(prompt, think, answer, media)
        return Mark(None) if verdict is None else Mark(sum(verdict[key] for key in CRITERIA) / len(CRITERIA), verdict)


def build_judge(config: JudgeConfig) -> SegmentJudge:
    """The judge a config asks for. Raises ConfigError for an endpoint that is not fully specified."""
    if config.kind == "rule":
        from rewards.rule_judge import RuleJudge

        return RuleJudge()
    if config.kind == "managed":
        raise ConfigError("rewards.judge.kind managed needs a run that starts the judge; outside one use kind: openai")
    from rewards.openai_judge import OpenAIJudge  # the openai package takes 0.7 s to import: only where it is used

    return OpenAIJudge(config)
