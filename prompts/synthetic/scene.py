"""A scene: what is seen and heard in each of four equal time slots, as exact ground truth."""

from __future__ import annotations

import json
from dataclasses import dataclass

SLOTS = 4
SLOT_SECONDS = 0.32
FRAMES_PER_SLOT = 2  # one temporal patch of Qwen's video encoder
FRAMES = SLOTS * FRAMES_PER_SLOT

#: RGB. Far apart in luma as well as in chroma, which 4:2:0 subsampling halves.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (30, 190, 50),
    "blue": (45, 75, 235),
    "yellow": (235, 220, 40),
}
PITCHES: dict[str, float] = {"low": 300.0, "mid": 900.0, "high": 2700.0}  # Hz
FORMS = ("square", "disc")
PLACES = ("left", "center", "right")
NONE = "none"  # a silent slot

PLACE_PIXELS = 28  # width of one place: one merged patch of Qwen's video encoder
WIDTH, HEIGHT = PLACE_PIXELS * len(PLACES), 28


@dataclass(frozen=True)
class Sprite:
    """One coloured shape."""

    form: str
    colours: tuple[str, ...]  # (SLOTS,)
    path: tuple[float, ...]  # (FRAMES,) x of its centre, in pixels
    lit: tuple[bool, ...] = (False,) * SLOTS  # a white core marks it as the source of the sound

    def places(self) -> tuple[str, ...]:
        """Place in each slot, by its mean x."""
        xs = [
            sum(self.path[s * FRAMES_PER_SLOT : (s + 1) * FRAMES_PER_SLOT]) / FRAMES_PER_SLOT
            for s in range(SLOTS)
        ]
        return tuple(PLACES[min(int(x // PLACE_PIXELS), len(PLACES) - 1)] for x in xs)


@dataclass(frozen=True)
class Scene:
    sprites: tuple[Sprite, ...]
    sounds: tuple[str, ...]  # (SLOTS,) pitch name or NONE

    def audio_caption(self) -> str:
        return (
            "Heard in turn: "
            + ", ".join("silence" if s == NONE else f"{s} beep" for s in self.sounds)
            + "."
        )

    def caption(self) -> str:
        """What is seen and heard."""
        return " ".join([*(_describe(sprite) for sprite in self.sprites), self.audio_caption()])

    def truth(self) -> str:
        """Ground truth of every slot as compact JSON, for rule-based judges."""
        sprites = [
            {
                "form": s.form,
                "colours": s.colours,
                "places": s.places(),
                "lit": [int(x) for x in s.lit],
            }
            for s in self.sprites
        ]
        record = {"slot_seconds": SLOT_SECONDS, "sprites": sprites, "sounds": self.sounds}
        return json.dumps(record, separators=(",", ":"))


def _describe(sprite: Sprite) -> str:
    colours, places = sprite.colours, sprite.places()
    colour = colours[0] if len(set(colours)) == 1 else "colour-changing"
    text = f"A {colour} {sprite.form} "
    text += (
        f"stays at the {places[0]}" if len(set(places)) == 1 else "is at the " + ", ".join(places)
    )
    if len(set(colours)) > 1:
        text += " and turns " + ", ".join(colours)
    if any(sprite.lit):
        text += f", lit in part {sprite.lit.index(True) + 1} of {SLOTS}"
    return text + "."


def place_x(place: str) -> float:
    """Centre of a place, in pixels."""
    return (PLACES.index(place) + 0.5) * PLACE_PIXELS


def path_of(places: tuple[str, ...]) -> tuple[float, ...]:
    """(SLOTS,) places -> (FRAMES,) centres, standing still within a slot."""
    return tuple(place_x(place) for place in places for _ in range(FRAMES_PER_SLOT))
