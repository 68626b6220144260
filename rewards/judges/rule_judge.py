"""The exact judge of the synthetic world: the four criteria computed from ground truth
(docs/method.md 1.5, docs/synthetic-world.md)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from avatar_rl.prompts.choices import choice_letter, option_texts
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.accuracy import answer_score
from avatar_rl.rewards.answers.grounding import Segment
from avatar_rl.rewards.answers.text import words
from avatar_rl.rewards.judges.base import ContentPart, Verdict
from avatar_rl.rewards.judges.prompts import ANSWER
from avatar_rl.rewards.judges.rule_segments import completeness, consistency

_NUMBERS = {
    name: str(value)
    for value, name in enumerate(("zero", "one", "two", "three", "four", "five", "six"))
}
_SAME = {
    "centre": "center",
    "middle": "center",
    "disk": "disc",
    "circle": "disc",
    "silence": "none",
    "silent": "none",
} | _NUMBERS
_PLURAL = re.compile(r"(?<=[a-z]{3})s$")

#: What the synthetic world can say of sounds, of things, and of places.
AUDIBLE = frozenset(
    {
        "low",
        "mid",
        "medium",
        "high",
        "beep",
        "tone",
        "sound",
        "none",
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "first",
        "second",
        "third",
        "last",
    }
)
VISIBLE = frozenset(
    {
        "red",
        "green",
        "blue",
        "yellow",
        "white",
        "black",
        "orange",
        "purple",
        "cyan",
        "magenta",
        "square",
        "disc",
        "triangle",
    }
)
PLACED = frozenset({"left", "right", "center", "top", "bottom", "up", "down", "above", "below"})


def terms(text: str) -> Counter[str]:
    """Words in singular and one spelling, counted."""
    return Counter(
        _SAME.get(word, word) for word in (_PLURAL.sub("", word) for word in words(text))
    )


class RuleJudge:
    """Scores by comparing the facts a completion claims with those of the scene; never fails, needs
    no network.

    Facts are the words of one kind (sounds, things, places). For each kind the score is the F1 of
    two shares: of the claimed facts, those true of the scene; of the facts the reference reasoning
    and answer use, those claimed. Where the reference uses none, claiming nothing scores 1.
    Sounds and things are read in the reasoning. Places, and for ``caption_corr_score`` all three
    kinds, are read in the final answer and compared with the true one."""

    async def verdict(
        self, prompt: Prompt, think: str, answer: str, media: Sequence[ContentPart]
    ) -> Verdict:
        return self.score(prompt, think, answer)

    def score(self, prompt: Prompt, think: str, answer: str) -> Verdict:
        """The four scores in [0, 1] of a reasoning and an answer."""
        truth = _answer_text(prompt, prompt.answer)
        needed = terms(f"{prompt.reasoning or ''} {truth}")
        scene = _with_counting(
            terms(f"{prompt.caption or ''} {prompt.audio_caption or ''}") | needed
        )
        thought, final, true = terms(think), terms(_answer_text(prompt, answer)), terms(truth)
        return {
            "audio_grounding_score": agreement(thought, needed, scene, AUDIBLE),
            "visual_id_score": agreement(thought, needed, scene, VISIBLE),
            "location_acc_score": agreement(final, true, true, PLACED),
            "caption_corr_score": agreement(final, true, true, AUDIBLE | VISIBLE | PLACED),
        }

    async def answer(self, prompt: Prompt, answer: str) -> Verdict:
        """The answer by rule, numbers exactly."""
        return {ANSWER[0]: answer_score(prompt, answer, numeric="exact")}

    async def consistency(
        self, prompt: Prompt, segment: Segment, media: Sequence[ContentPart]
    ) -> Verdict | None:
        """See ``rule_segments.consistency``."""
        return consistency(prompt, segment)

    async def completeness(
        self, prompt: Prompt, segments: Sequence[Segment], media: Sequence[ContentPart]
    ) -> Verdict | None:
        """See ``rule_segments.completeness``."""
        return completeness(prompt, segments)

    async def check(self) -> None:
        """Always ready."""

    async def close(self) -> None:
        """Holds nothing."""

    def stats(self) -> dict[str, float]:
        return {}


def agreement(
    claimed: Counter[str], needed: Counter[str], scene: Counter[str], kind: frozenset[str]
) -> float:
    """F1 of precision (claimed facts of this kind true of the scene) and recall (needed facts
    claimed), in [0, 1]."""
    claims, wanted = claimed.keys() & kind, needed.keys() & kind
    if not claims:
        return float(not wanted)
    precision = len(claims & scene.keys()) / len(claims)
    recall = len(claims & wanted) / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _with_counting(scene: Counter[str]) -> Counter[str]:
    """The scene's facts, and every number up to its beeps or its largest number: counting up to it
    is right."""
    top = max([scene["beep"], *(int(word) for word in scene if word.isdecimal() and len(word) < 3)])
    return scene | Counter(str(number) for number in range(top + 1))


def _answer_text(prompt: Prompt, answer: str) -> str:
    """An answer in words: the option's text for a letter."""
    letter = choice_letter(answer, prompt.options) if prompt.options else None
    return option_texts(prompt.options)[letter] if letter else answer
