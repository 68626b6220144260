"""r_cons and r_comp of OmniVideo-R1: are the segments described truly, and are they the right ones
(docs/method.md 2.1)."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Protocol

from avatar_rl.common.errors import AvatarError
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.grounding import Segment, parse_grounded
from avatar_rl.rewards.judges.attachments import Clip, cut
from avatar_rl.rewards.judges.base import Attach, ContentPart, Judge, Verdict, names_scores
from avatar_rl.rewards.judges.segment_prompts import COMPLETENESS, CONSISTENCY
from avatar_rl.rewards.record import Completion, Mark, ScoreRequest

log = logging.getLogger(__name__)


class SegmentJudge(Judge, Protocol):
    """A judge that also scores segments and answers; every method gives None where it could
    not."""

    async def answer(self, prompt: Prompt, answer: str) -> Verdict | None: ...

    async def consistency(
        self, prompt: Prompt, segment: Segment, media: Sequence[ContentPart]
    ) -> Verdict | None: ...

    async def completeness(
        self, prompt: Prompt, segments: Sequence[Segment], media: Sequence[ContentPart]
    ) -> Verdict | None: ...


class SegmentReward:
    """Common to both: the valid segments of a completion and their clips."""

    name = ""

    def __init__(self, judge: SegmentJudge, attach: Attach | None, *, along: bool = False) -> None:
        """``along``: segments may stand anywhere up to the end of the reasoning."""
        self._judge, self._attach, self._along = judge, attach, along
        self.counts: Counter[str] = Counter()

    async def score(self, request: ScoreRequest) -> list[Mark]:
        return list(
            await asyncio.gather(*(self._mark(request.prompt, one) for one in request.completions))
        )

    async def _mark(self, prompt: Prompt, completion: Completion) -> Mark:
        if names_scores(completion.text, (*CONSISTENCY, *COMPLETENESS)):
            return Mark(0.0)  # a verdict, not a failure
        segments = parse_grounded(completion.text, along=self._along).segments
        return await self._judged(prompt, [self._clip(prompt, segment) for segment in segments])

    def _clip(self, prompt: Prompt, segment: Segment | None) -> Clip | None:
        """The segment with the prompt cut down to it; None for one that is malformed or outside the
        media."""
        if segment is None or not segment.valid:
            return None
        return cut(prompt, segment)

    async def _judged(self, prompt: Prompt, clips: Sequence[Clip | None]) -> Mark:
        raise NotImplementedError

    async def _shown(self, clip: Clip) -> Sequence[ContentPart] | None:
        """Frames and sound of a clip; None where it cannot be cut out, which counts as an invalid
        segment."""
        if self._attach is None:
            return ()
        try:
            return await asyncio.to_thread(self._attach, clip.prompt)
        except (AvatarError, OSError) as error:
            if not self.counts["uncuttable"]:
                log.warning(
                    "%s: a segment of prompt %s cannot be cut: %s", self.name, clip.prompt.id, error
                )
            self.counts["uncuttable"] += 1
            return None


class SegmentConsistency(SegmentReward):
    """r_cons: mean over the segments of the judged fit of caption and clip; an invalid or
    uncuttable one counts 0.

    0 without segments; masked where the judge failed on one, as the mean is not known then.
    """

    name = "segment_consistency"

    async def _judged(self, prompt: Prompt, clips: Sequence[Clip | None]) -> Mark:
        if not clips:
            return Mark(0.0)
        scores = await asyncio.gather(*(self._fit(prompt, clip) for clip in clips))
        known = [score for score in scores if score is not None]
        return Mark(fmean(known)) if len(known) == len(scores) else Mark(None)

    async def _fit(self, prompt: Prompt, clip: Clip | None) -> float | None:
        media = None if clip is None else await self._shown(clip)
        if clip is None or media is None:
            return 0.0
        verdict = await self._judge.consistency(prompt, clip.segment, media)
        return None if verdict is None else fmean(verdict.values())


class SegmentCompleteness(SegmentReward):
    """r_comp: judged once on the clips of all valid segments, in their order; 0 if there is
    none."""

    name = "segment_completeness"

    async def _judged(self, prompt: Prompt, clips: Sequence[Clip | None]) -> Mark:
        shown = [(clip, await self._shown(clip)) for clip in clips if clip is not None]
        kept = [(clip, media) for clip, media in shown if media is not None]
        if not kept:
            return Mark(0.0)
        media = [part for _, parts in kept for part in parts]
        verdict = await self._judge.completeness(prompt, [clip.segment for clip, _ in kept], media)
        return Mark(None) if verdict is None else Mark(fmean(verdict.values()), verdict)
