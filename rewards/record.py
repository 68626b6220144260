"""What goes into a reward suite and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from avatar_rl.common.errors import DataError
from avatar_rl.common.scoring import Completion
from avatar_rl.prompts.record import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """The fresh completions of one prompt, scored together.

    The unimodal rollouts are for the ``fusion`` reward only (docs/method.md 2.2): the i-th is
    paired with the i-th completion. ``opened_tag`` is the think tag that the prompt ended with, ""
    where with none, None where nobody knows."""

    prompt: Prompt
    completions: list[Completion]
    video_only: list[Completion] | None = None
    audio_only: list[Completion] | None = None
    opened_tag: str | None = None

    def __post_init__(self) -> None:
        if not self.completions:
            raise DataError(
                f"prompt {self.prompt.id}: a score request needs at least one completion"
            )
        for name, rollouts in (("video_only", self.video_only), ("audio_only", self.audio_only)):
            if rollouts is not None and len(rollouts) != len(self.completions):
                raise DataError(
                    f"prompt {self.prompt.id}: {len(rollouts)} {name} rollouts for "
                    f"{len(self.completions)} "
                    "completions; they are paired one to one (docs/method.md 2.2)"
                )


@dataclass(frozen=True, slots=True)
class Mark:
    """What one component says of one completion; None means not scored (masked), which is not a
    zero."""

    value: float | None
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One scored completion.

    ``reward`` is None when a weighted component is masked and nothing is known to stand for it
    (masking.py). ``components`` holds all components by name, weight 0 included; ``details`` what
    they are made of (the judge's criteria), for logs only."""

    reward: float | None
    imputed: bool = False  # the reward rests on a mean in place of a mark
    components: dict[str, float | None]
    details: dict[str, float] = field(default_factory=dict)
