"""Records between rollout actors and reward actors: completions to score, and their scores.

They live here because actors and rewards do not import one another.
"""

from __future__ import annotations

import math

import msgspec

from avatar_rl.common.errors import DataError


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One generated completion as text, without the end-of-turn token.

    Raises DataError where ``mean_logprob`` or ``tokens`` are impossible.
    """

    text: str
    finished: bool  # False when it was cut at the token limit
    mean_logprob: float  # mean behaviour log-probability of its tokens, natural log
    tokens: int
    # mean over the answer's tokens; None where nobody asked for it, or without an answer
    answer_logprob: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean_logprob) or self.tokens < 0:
            raise DataError(
                f"completion with mean_logprob {self.mean_logprob} over {self.tokens} tokens: "
                "needs a finite log-probability and tokens >= 0; check what the rollout engine "
                "returned"
            )


class UnscoredGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The completions of one prompt, as a rollout actor sends them to a reward actor.

    The unimodal completions are for the ``fusion`` reward only (docs/method.md 2.2). The i-th is
    paired with the i-th completion. ``opened_tag`` is the think tag that the prompt ended with, ""
    where with none, None where nobody knows.
    """

    prompt_id: str
    completions: list[Completion]
    video_only: list[Completion] | None = None
    audio_only: list[Completion] | None = None
    opened_tag: str | None = None


class CompletionScore(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a reward actor for one completion."""

    reward: float | None  # None when a weighted component is masked and nothing stands for it
    imputed: bool = False  # rests on a mean in place of a masked mark: no statistic counts it
    components: dict[str, float | None]  # by name, weight 0 included; None where masked
    details: dict[str, float] = {}  # what they are made of, e.g. "judge/visual_id_score"
