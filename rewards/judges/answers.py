"""r_ans of OmniVideo-R1: the letter for multiple choice, a judge for open answers (docs/method.md
2.1); and r_attn, which compares it between modalities (2.2)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.answers.accuracy import accuracy_score
from avatar_rl.rewards.answers.format import extract_answer
from avatar_rl.rewards.config import FusionConfig
from avatar_rl.rewards.group_rewards import attention_score
from avatar_rl.rewards.judges.base import Verdict, names_scores
from avatar_rl.rewards.judges.prompts import ANSWER
from avatar_rl.rewards.record import Completion, Mark, ScoreRequest


class AnswerScorer(Protocol):
    """A judge of final answers; None where it could not."""

    async def answer(self, prompt: Prompt, answer: str) -> Verdict | None: ...


class AnswerJudge:
    """Component ``answer_judge``. No answer block is 0, and so is one that names the judge's own
    key."""

    name = "answer_judge"

    def __init__(
        self, judge: AnswerScorer, asked: Literal["open", "all"], max_answer_chars: int
    ) -> None:
        self._judge, self._asked, self._max_chars = judge, asked, max_answer_chars

    async def score(self, request: ScoreRequest) -> list[Mark]:
        return [Mark(v) for v in await self.values(request.prompt, request.completions)]

    async def values(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float | None]:
        """In [0, 1] each; None where the judge failed."""
        return list(await asyncio.gather(*(self._value(prompt, one) for one in completions)))

    async def _value(self, prompt: Prompt, completion: Completion) -> float | None:
        is_choice = prompt.problem_type is ProblemType.MULTIPLE_CHOICE
        if is_choice and self._asked == "open":
            return accuracy_score(
                prompt, completion.text, numeric="exact", max_answer_chars=self._max_chars
            )
        answer = extract_answer(completion.text)
        too_long = answer is not None and len(answer) > max(self._max_chars, 4 * len(prompt.answer))
        if answer is None or too_long or names_scores(completion.text, ANSWER):
            return 0.0
        verdict = await self._judge.answer(prompt, answer)
        return None if verdict is None else verdict[ANSWER[0]]


class Fusion:
    """Component ``fusion``: pays where the answer from sight and sound is at least as good as the
    i-th from either alone, or as sure. Masked where there is nothing to compare with."""

    name = "fusion"

    def __init__(
        self,
        config: FusionConfig,
        rules: Callable[[Prompt, Sequence[Completion]], list[float]],
        judged: AnswerJudge | None,
    ) -> None:
        """``rules`` and ``judged`` give r_ans: ``judged`` where the stage pays it."""
        self._config, self._rules, self._judged = config, rules, judged

    async def score(self, request: ScoreRequest) -> list[Mark]:
        if request.video_only is None or request.audio_only is None:
            return [Mark(None)] * len(request.completions)
        parts = (request.completions, request.video_only, request.audio_only)
        columns = await asyncio.gather(*(self._values(request.prompt, part) for part in parts))
        return [self._mark(*values) for values in zip(*columns, strict=True)]

    async def _values(
        self, prompt: Prompt, completions: Sequence[Completion]
    ) -> list[float | None]:
        if self._config.signal == "confidence":
            return [
                -math.inf if one.answer_logprob is None else one.answer_logprob
                for one in completions
            ]
        if self._judged is not None:
            return await self._judged.values(prompt, completions)
        return list(self._rules(prompt, completions))

    def _mark(self, both: float | None, video: float | None, audio: float | None) -> Mark:
        if both is None or video is None or audio is None:
            return Mark(None)
        if both == -math.inf:
            return Mark(0.0)  # no answer to be sure of
        return Mark(attention_score(both, video, audio, strict=self._config.strict))
