"""A judge behind an OpenAI-compatible endpoint: never a silent zero (docs/method.md 1.5, 2.1)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from avatar_rl.common.chat_client import ChatClient, Messages, NoReply
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.grounding import Segment
from avatar_rl.rewards.config import JudgeConfig
from avatar_rl.rewards.judges.base import CRITERIA, ContentPart, Verdict
from avatar_rl.rewards.judges.prompts import (
    ANSWER,
    answer_messages,
    build_messages,
    parse_scores,
)
from avatar_rl.rewards.judges.segment_prompts import (
    COMPLETENESS,
    CONSISTENCY,
    completeness_messages,
    consistency_messages,
)
from avatar_rl.rewards.judges.template import JudgeTemplate

LAST_OTHERS = 64  # completions that tell whether the judge can be read at all
FEWEST_OTHERS = 16  # with fewer nothing is known
READABLE_SHARE = 0.75


class OpenAIJudge:
    """Asks the endpoint once per distinct material.

    What cannot be scored within its attempts and deadline gets None, and is counted (``stats``).
    Raises ConfigError for a missing URL, model or key. Belongs to one event loop."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._template = None if config.prompt is None else JudgeTemplate.read(config.prompt)
        self._client = ChatClient(config, role="judge", named="rewards.judge.{}".format)
        #: Of the last completions, whether the judge's replies on them could be read.
        self._readable: deque[bool] = deque(maxlen=LAST_OTHERS)

    async def verdict(
        self, prompt: Prompt, think: str, answer: str, media: Sequence[ContentPart]
    ) -> Verdict | None:
        """The four scores; None if they could not be had."""
        first, again = (
            build_messages(
                prompt,
                think,
                answer,
                media,
                max_chars=self._config.max_chars,
                remind=remind,
                template=self._template,
            )
            for remind in (False, True)
        )
        return await self._scores(prompt, first, again, CRITERIA)

    async def answer(self, prompt: Prompt, answer: str) -> Verdict | None:
        """How far a final answer means the true one (docs/method.md 2.1); None if that could not be
        had."""
        first, again = (
            answer_messages(prompt, answer, max_chars=self._config.max_chars, remind=remind)
            for remind in (False, True)
        )
        return await self._scores(prompt, first, again, ANSWER)

    async def consistency(
        self, prompt: Prompt, segment: Segment, media: Sequence[ContentPart]
    ) -> Verdict | None:
        """How well a caption fits the clip in ``media`` (docs/method.md 2.1); None if that could
        not be had."""
        first, again = (
            consistency_messages(segment, media, max_chars=self._config.max_chars, remind=remind)
            for remind in (False, True)
        )
        return await self._scores(prompt, first, again, CONSISTENCY)

    async def completeness(
        self, prompt: Prompt, segments: Sequence[Segment], media: Sequence[ContentPart]
    ) -> Verdict | None:
        """How well the clips in ``media`` answer the question (docs/method.md 2.1); None if that
        could not be had."""
        first, again = (
            completeness_messages(prompt, segments, media, remind=remind)
            for remind in (False, True)
        )
        return await self._scores(prompt, first, again, COMPLETENESS)

    async def check(self) -> None:
        """Raises ResourceError if the endpoint is silent, ConfigError if it refuses the key or
        lacks the model."""
        await self._client.check()

    async def close(self) -> None:
        """Cancel what is in flight and close the connections."""
        await self._client.close()

    def stats(self) -> dict[str, float]:
        """Requests, replies, tokens, cache_hits, unscored, missing_keys, and every kind of failure
        by name."""
        return self._client.stats()

    async def _scores(
        self, prompt: Prompt, first: Messages, again: Messages, criteria: tuple[str, ...]
    ) -> Verdict | None:
        def parse(reply: str) -> Verdict:
            scores, missing = parse_scores(reply, criteria)
            self._client.counts["missing_keys"] += missing
            return scores

        reply = await self._client.ask(prompt.id, first, again, parse)
        if not isinstance(reply, NoReply):
            self._readable.append(True)
            return dict(reply)
        others = len(self._readable)
        seen = sum(self._readable)
        self._readable.append(False)
        if reply.unusable and others >= FEWEST_OTHERS and seen >= READABLE_SHARE * others:
            # The judge can be read but for this completion, so it is the completion's doing.
            self._client.counts["unreadable_as_zero"] += 1
            return dict.fromkeys(criteria, 0.0)
        return None
