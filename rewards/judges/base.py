"""What every judge is: four criteria, what it is shown and what it answers (docs/method.md 1.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from avatar_rl.common.types import ReadOnlyObject
from avatar_rl.prompts.record import Prompt

#: The keys of a verdict; each is scored in [0, 1] and the reward is their mean.
CRITERIA = ("audio_grounding_score", "visual_id_score", "location_acc_score", "caption_corr_score")

Verdict = dict[str, float]
#: One part of an OpenAI chat message: {"type": "text", "text": ...}.
ContentPart = ReadOnlyObject
#: OpenAI content parts (image_url, input_audio) that show a prompt's media to the judge. May block:
#: runs in a thread.
Attach = Callable[[Prompt], Sequence[ContentPart]]


def names_scores(text: str, criteria: Sequence[str]) -> bool:
    """Whether a completion writes the judge's own score keys, which no honest reasoning does: it
    wants to be read as the verdict. Keys that are plain words count in quotes, as in JSON."""
    return any(
        key in text if key.endswith("_score") else f'"{key}"' in text or f"'{key}'" in text
        for key in criteria
    )


class Judge(Protocol):
    """Something that scores reasoning and answer by the four criteria. None means that it could
    not."""

    async def verdict(
        self, prompt: Prompt, think: str, answer: str, media: Sequence[ContentPart]
    ) -> Verdict | None: ...

    async def check(self) -> None: ...

    async def close(self) -> None: ...

    def stats(self) -> dict[str, float]: ...
