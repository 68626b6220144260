"""Segments judged by the exact ground truth of the synthetic world (docs/method.md 2.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypedDict

from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.grounding import Segment
from avatar_rl.rewards.answers.text import words
from avatar_rl.rewards.judges.base import Verdict
from avatar_rl.rewards.judges.segment_prompts import COMPLETENESS, CONSISTENCY

_SIGHTS = frozenset({"red", "green", "blue", "yellow", "square", "disc", "left", "center", "right"})
_SOUNDS = frozenset({"low", "mid", "high", "beep", "none"})
_PLURAL = {
    "squares": "square",
    "discs": "disc",
    "beeps": "beep",
    "silence": "none",
    "centre": "center",
}


def slots_of(prompt: Prompt) -> list[frozenset[str]]:
    """Per time slot of the scene the words that are true of it. Empty for a prompt without ground
    truth."""
    if "scene" not in prompt.extra:
        return []
    scene: _Scene = json.loads(str(prompt.extra["scene"]))
    return [_facts(scene, slot) for slot in range(len(scene["sounds"]))]


class _Sprite(TypedDict):
    """One thing that is seen; colour and place per time slot."""

    form: str
    colours: list[str]
    places: list[str]


class _Scene(TypedDict):
    """What the synthetic world writes into ``Prompt.extra["scene"]``, as far as judges read it."""

    slot_seconds: float
    sounds: list[str]  # per time slot
    sprites: list[_Sprite]


def _facts(scene: _Scene, slot: int) -> frozenset[str]:
    sound = scene["sounds"][slot]
    facts = {sound} if sound == "none" else {sound, "beep"}
    for sprite in scene["sprites"]:
        facts |= {sprite["form"], sprite["colours"][slot], sprite["places"][slot]}
    return frozenset(facts)


def touched(prompt: Prompt, segment: Segment) -> list[int]:
    """Slots of which a segment covers more than half."""
    if "scene" not in prompt.extra:
        return []
    seconds = float(json.loads(str(prompt.extra["scene"]))["slot_seconds"])
    covered = (
        (slot, min(segment.end, (slot + 1) * seconds) - max(segment.start, slot * seconds))
        for slot in range(len(slots_of(prompt)))
    )
    return [slot for slot, overlap in covered if overlap > seconds / 2]


def consistency(prompt: Prompt, segment: Segment) -> Verdict:
    """The four criteria of a caption: shares of its words about sights and sounds that are true of
    its slots.

    ``visible``: forms and colours; ``attributes``: places; ``nothing_invented``: all; a kind it
    does not speak of is 1. A segment that covers no slot, or a caption without any such word,
    scores 0."""
    slots = slots_of(prompt)
    true = frozenset().union(*(slots[slot] for slot in touched(prompt, segment)))
    said = {_PLURAL.get(word, word) for word in words(segment.caption)} & (_SIGHTS | _SOUNDS)
    if not true or not said:
        return dict.fromkeys(CONSISTENCY, 0.0)
    places = frozenset({"left", "center", "right"})
    kinds = (_SIGHTS - places, places, _SIGHTS | _SOUNDS, _SOUNDS)
    return {name: _share(said & kind, true) for name, kind in zip(CONSISTENCY, kinds, strict=True)}


def completeness(prompt: Prompt, segments: Sequence[Segment]) -> Verdict:
    """The three criteria of a choice of segments, by the slots that hold a word of the answer (all,
    where none does).

    ``sufficient``: one such slot is covered, ``tight``: share of covered slots that are such,
    ``complete``: share of such slots that are covered."""
    slots = slots_of(prompt)
    wanted = {_PLURAL.get(word, word) for word in words(_spoken(prompt))} & (_SIGHTS | _SOUNDS)
    needed = {slot for slot, facts in enumerate(slots) if facts & wanted} or set(range(len(slots)))
    covered = {slot for segment in segments for slot in touched(prompt, segment)}
    if not covered or not needed:
        return dict.fromkeys(COMPLETENESS, 0.0)
    hit = len(covered & needed)
    return dict(
        zip(COMPLETENESS, (float(hit > 0), hit / len(covered), hit / len(needed)), strict=True)
    )


def _spoken(prompt: Prompt) -> str:
    """The answer in words: the option's text for a letter."""
    chosen = [option for option in prompt.options if option.startswith(f"{prompt.answer}.")]
    return chosen[0].partition(".")[2] if chosen else prompt.answer


def _share(said: set[str], true: frozenset[str]) -> float:
    return len(said & true) / len(said) if said else 1.0
