"""One builder per question type: a scene drawn for the question, the answer, and how to reason
towards it.

``turn`` counts the questions of a type within a split. The answer class follows it, so classes are
exactly balanced and a blind guess is at chance. What the question does not need is drawn on its
own: a question that needs hearing cannot be answered from the picture, and the other way round.
Where it needs both, either half alone is at chance too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.random import Generator

from avatar_rl.prompts.record import Modality, ProblemType
from avatar_rl.prompts.synthetic.config import Category
from avatar_rl.prompts.synthetic.scene import (
    COLOURS,
    FORMS,
    FRAMES,
    NONE,
    PITCHES,
    PLACES,
    SLOTS,
    Scene,
    Sprite,
    path_of,
    place_x,
)

SEE: tuple[Modality, ...] = ("video",)
HEAR: tuple[Modality, ...] = ("audio",)
BOTH: tuple[Modality, ...] = ("video", "audio")
LETTERS = "ABC"
COUNTS = ("0", "1", "2")  # of a count with a condition


@dataclass(frozen=True)
class Draft:
    """A question about a scene, before its media are rendered."""

    scene: Scene
    question: str
    answer: str
    problem_type: ProblemType
    needs: tuple[Modality, ...]
    hint: str
    readout: (
        str  # slot by slot, what the conclusion rests on; empty where there is nothing to spell out
    )
    conclusion: str
    answers: tuple[str, ...]  # all that a blind guess chooses from
    options: tuple[str, ...] = ()

    def reasoning(self) -> str:
        """SFT target inside <think>."""
        return f"{self.readout} so {self.conclusion}".lstrip()


def draft(category: Category, rng: Generator, turn: int) -> Draft:
    """Draw question number ``turn`` of a type."""
    return _BUILDERS[category](rng, turn)


def _pick(rng: Generator, values: tuple[str, ...] | list[str], n: int) -> list[str]:
    """``n`` distinct values in random order."""
    return [values[i] for i in rng.permutation(len(values))[:n]]


def _class(values: tuple[str, ...], turn: int) -> str:
    return values[turn % len(values)]


def _choices(
    rng: Generator, values: tuple[str, ...], correct: str, turn: int
) -> tuple[tuple[str, ...], str]:
    """Options in random order and the letter of the correct one, which rotates with ``turn``."""
    others = _pick(rng, [value for value in values if value != correct], len(values) - 1)
    at = (turn // len(values)) % len(values)
    texts = [*others[:at], correct, *others[at:]]
    return tuple(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=True)), LETTERS[
        at
    ]


def _slots(rng: Generator, n: int) -> list[int]:
    return sorted(int(i) for i in rng.permutation(SLOTS)[:n])


def _fill(slots: list[int], values: list[str]) -> tuple[str, ...]:
    """(SLOTS,) values at ``slots``, NONE elsewhere."""
    filled = [NONE] * SLOTS
    for slot, value in zip(slots, values, strict=True):
        filled[slot] = value
    return tuple(filled)


def _same_beeps(rng: Generator, n: int, pitch: str) -> tuple[str, ...]:
    return _fill(_slots(rng, n), [pitch] * n)


def _any_sounds(rng: Generator) -> tuple[str, ...]:
    """Sounds of a question that does not need them."""
    if rng.random() < 0.5:
        return _same_beeps(rng, int(rng.integers(1, SLOTS + 1)), _pick(rng, list(PITCHES), 1)[0])
    return _fill(_slots(rng, len(PITCHES)), _pick(rng, list(PITCHES), len(PITCHES)))


def _still(form: str, colour: str, place: str) -> Sprite:
    return Sprite(form, (colour,) * SLOTS, path_of((place,) * SLOTS))


def _moving(rng: Generator, form: str, colour: str, way: str) -> Sprite:
    """Still at any place, or crossing the picture from end to end."""
    if way == "still":
        return _still(form, colour, PLACES[rng.integers(len(PLACES))])
    start, end = place_x("left") + rng.uniform(0, 12), place_x("right") - rng.uniform(0, 12)
    if way == "left":
        start, end = end, start
    return Sprite(form, (colour,) * SLOTS, tuple(float(x) for x in np.linspace(start, end, FRAMES)))


def _form(rng: Generator) -> str:
    return FORMS[rng.integers(len(FORMS))]


def _any_sprites(rng: Generator) -> tuple[Sprite, ...]:
    """Picture of a question that does not need it."""
    colours = _pick(rng, list(COLOURS), 2)
    kind = rng.integers(3)
    if kind == 0:
        return (_moving(rng, _form(rng), colours[0], ("left", "right", "still")[rng.integers(3)]),)
    if kind == 1:
        return tuple(
            _still(_form(rng), c, p) for c, p in zip(colours, _pick(rng, PLACES, 2), strict=True)
        )
    return (
        Sprite(_form(rng), tuple(_pick(rng, list(COLOURS), SLOTS)), path_of(("center",) * SLOTS)),
    )


def _colour(rng: Generator, turn: int) -> Draft:
    colour = _class(tuple(COLOURS), turn)
    form = _form(rng)
    scene = Scene(
        (_moving(rng, form, colour, ("left", "right", "still")[rng.integers(3)]),), _any_sounds(rng)
    )
    hint = "Look at the shape itself, not at the walls or the floor."
    return Draft(
        scene,
        f"What colour is the {form}?",
        colour,
        ProblemType.FREE_FORM,
        SEE,
        hint,
        "",
        colour,
        tuple(COLOURS),
    )


def _pitch(rng: Generator, turn: int) -> Draft:
    pitch = _class(tuple(PITCHES), turn)
    scene = Scene(_any_sprites(rng), _same_beeps(rng, int(rng.integers(1, SLOTS + 1)), pitch))
    hint = "Listen to any beep and judge how deep or how bright it sounds."
    return Draft(
        scene,
        "Which pitch do the beeps have?",
        pitch,
        ProblemType.FREE_FORM,
        HEAR,
        hint,
        " ".join(scene.sounds),
        pitch,
        tuple(PITCHES),
    )


def _side(rng: Generator, turn: int) -> Draft:
    place = _class(PLACES, turn)
    other = _pick(rng, [p for p in PLACES if p != place], 1)[0]
    asked, colour = _pick(rng, list(COLOURS), 2)
    sprites = (_still(_form(rng), asked, place), _still(_form(rng), colour, other))
    options, letter = _choices(rng, PLACES, place, turn)
    shown = sorted([(place, asked), (other, colour)], key=lambda pair: PLACES.index(pair[0]))
    return Draft(
        Scene(sprites, _any_sounds(rng)),
        f"Where is the {asked} shape?",
        letter,
        ProblemType.MULTIPLE_CHOICE,
        SEE,
        "Name every shape with its place, then find the shape that is asked for.",
        " ".join(f"{colour} {place}" for place, colour in shown),
        f"{asked} {place} {letter}",
        tuple(LETTERS),
        options,
    )


def _beeps(rng: Generator, turn: int) -> Draft:
    n = turn % SLOTS + 1
    sounds = _same_beeps(rng, n, _pick(rng, list(PITCHES), 1)[0])
    return Draft(
        Scene(_any_sprites(rng), sounds),
        "How many beeps are there?",
        str(n),
        ProblemType.NUMERICAL,
        HEAR,
        "Go through the sound part by part and keep counting whenever it beeps.",
        _running_count([sound != NONE for sound in sounds]),
        str(n),
        tuple(str(i + 1) for i in range(SLOTS)),
    )


def _running_count(counted: list[bool]) -> str:
    count, words = 0, []
    for hit in counted:
        count += hit
        words.append(str(count) if hit else NONE)
    return " ".join(words)


def _order(rng: Generator, turn: int) -> Draft:
    asked = _class(tuple(PITCHES), turn)
    end = ("first", "last")[rng.integers(2)]
    others = _pick(rng, [p for p in PITCHES if p != asked], 2)
    sounds = _fill(_slots(rng, 3), [asked, *others] if end == "first" else [*others, asked])
    options, letter = _choices(rng, tuple(PITCHES), asked, turn)
    return Draft(
        Scene(_any_sprites(rng), sounds),
        f"Which beep comes {end}?",
        letter,
        ProblemType.MULTIPLE_CHOICE,
        HEAR,
        "Write down the pitch of every beep in the order in which they sound.",
        " ".join(sounds),
        f"{asked} {letter}",
        tuple(LETTERS),
        options,
    )


def _direction(rng: Generator, turn: int) -> Draft:
    ways = ("left", "right", "still")
    way = _class(ways, turn)
    form = _form(rng)
    sprite = _moving(rng, form, _pick(rng, list(COLOURS), 1)[0], way)
    options, letter = _choices(rng, ways, way, turn)
    return Draft(
        Scene((sprite,), _any_sounds(rng)),
        f"Which way does the {form} move?",
        letter,
        ProblemType.MULTIPLE_CHOICE,
        SEE,
        "Note the place of the shape in every part of the clip and compare.",
        " ".join(sprite.places()),
        f"{way} {letter}",
        tuple(LETTERS),
        options,
    )


def _colour_at_beep(rng: Generator, turn: int) -> Draft:
    colour = _class(tuple(COLOURS), turn)
    slots = _slots(rng, 2)
    pitches = _pick(rng, list(PITCHES), 2)
    asked = int(rng.integers(2))
    colours = _pick(rng, [c for c in COLOURS if c != colour], SLOTS - 1)
    colours.insert(slots[asked], colour)
    sounds = _fill(slots, pitches)
    form = _form(rng)
    sprite = Sprite(form, tuple(colours), path_of((PLACES[rng.integers(len(PLACES))],) * SLOTS))
    return Draft(
        Scene((sprite,), sounds),
        f"What colour is the {form} at the {pitches[asked]} beep?",
        colour,
        ProblemType.FREE_FORM,
        BOTH,
        "For every part of the clip note what you see together with what you hear.",
        " ".join(f"{s} {c}" for c, s in zip(colours, sounds, strict=True)),
        f"{pitches[asked]} {colour}",
        tuple(COLOURS),
    )


def _overlap(rng: Generator, k: int) -> tuple[list[int], list[int]]:
    """Two slots that fulfil a condition and two that beep, ``k`` of them shared.

    Both pairs are uniform whatever ``k``, so that neither says anything about it alone.
    """
    condition = _slots(rng, 2)
    rest = [slot for slot in range(SLOTS) if slot not in condition]
    beeps = [int(i) for i in rng.permutation(condition)[:k]] + [
        int(i) for i in rng.permutation(rest)[: 2 - k]
    ]
    return condition, sorted(beeps)


def _count_readout(seen: list[str], condition: list[int], beeps: list[int]) -> str:
    """What is seen in each slot; where it fulfils the condition also what is heard, and the count
    so far."""
    count, words = 0, []
    for slot in range(SLOTS):
        words.append(seen[slot])
        if slot in condition:
            count += slot in beeps
            words.append(f"beep {count}" if slot in beeps else NONE)
    return " ".join(words)


def _count_on_side(rng: Generator, turn: int) -> Draft:
    k = turn % len(COUNTS)
    condition, beeps = _overlap(rng, k)
    side, other = _pick(rng, ["left", "right"], 2)
    places = [side if slot in condition else other for slot in range(SLOTS)]
    form = _form(rng)
    sprite = Sprite(form, tuple(_pick(rng, list(COLOURS), 1) * SLOTS), path_of(tuple(places)))
    return Draft(
        Scene((sprite,), _fill(beeps, _pick(rng, list(PITCHES), 1) * 2)),
        f"How many beeps sound while the {form} is on the {side}?",
        str(k),
        ProblemType.NUMERICAL,
        BOTH,
        "For every part of the clip note the place and whether it beeps, and count only where "
        "both fit.",
        _count_readout(places, condition, beeps),
        str(k),
        COUNTS,
    )


def _count_left_of(rng: Generator, turn: int) -> Draft:
    k = turn % len(COUNTS)
    condition, beeps = _overlap(rng, k)
    first, second = _pick(rng, list(COLOURS), 2)
    forms = (_form(rng), _form(rng))
    places: list[tuple[str, str]] = []
    for slot in range(SLOTS):
        near, far = sorted(_pick(rng, PLACES, 2), key=PLACES.index)
        places.append((near, far) if slot in condition else (far, near))
    sprites = tuple(
        Sprite(form, (colour,) * SLOTS, path_of(tuple(pair[i] for pair in places)))
        for i, (form, colour) in enumerate(zip(forms, (first, second), strict=True))
    )
    seen = [
        f"{first} {second}" if slot in condition else f"{second} {first}" for slot in range(SLOTS)
    ]
    return Draft(
        Scene(sprites, _fill(beeps, _pick(rng, list(PITCHES), 1) * 2)),
        f"How many beeps sound while the {first} {forms[0]} is left of the {second} {forms[1]}?",
        str(k),
        ProblemType.NUMERICAL,
        BOTH,
        "For every part of the clip note which shape comes before the other and whether it beeps, "
        "then count.",
        _count_readout(seen, condition, beeps),
        str(k),
        COUNTS,
    )


def _slots_answer(places: tuple[str, str], pitches: list[str]) -> str:
    return " / ".join(
        f"{place.capitalize()}: {pitch}" for place, pitch in zip(places, pitches, strict=True)
    )


def _localise(rng: Generator, turn: int) -> Draft:
    pairs = (("left", "center"), ("left", "right"), ("center", "right"))
    near, far = pairs[turn % 3]
    pitches = _pick(rng, list(PITCHES), 2)  # of the near and of the far shape
    slots = _slots(rng, 2)
    order = rng.permutation(2)  # which of the two sounds first
    lit = [slots[int(np.flatnonzero(order == i)[0])] for i in range(2)]
    colours = _pick(rng, list(COLOURS), 2)
    sprites = tuple(
        Sprite(
            _form(rng),
            (colours[i],) * SLOTS,
            path_of((place,) * SLOTS),
            tuple(s == lit[i] for s in range(SLOTS)),
        )
        for i, place in enumerate((near, far))
    )
    sounds = _fill(lit, pitches)
    places = _fill(lit, [near, far])
    return Draft(
        Scene(sprites, sounds),
        "Which pitch does each shape make?",
        _slots_answer((near, far), pitches),
        ProblemType.LOCALISATION,
        BOTH,
        "Whenever it beeps, look which shape lights up and note its place with the pitch.",
        " ".join(NONE if s == NONE else f"{p} {s}" for p, s in zip(places, sounds, strict=True)),
        f"{near} {pitches[0]} {far} {pitches[1]}",
        tuple(_slots_answer(pair, list(two)) for pair in pairs for two in permutations(PITCHES, 2)),
    )


_BUILDERS: dict[Category, Callable[[Generator, int], Draft]] = {
    Category.COLOUR: _colour,
    Category.PITCH: _pitch,
    Category.SIDE: _side,
    Category.BEEPS: _beeps,
    Category.ORDER: _order,
    Category.DIRECTION: _direction,
    Category.COLOUR_AT_BEEP: _colour_at_beep,
    Category.COUNT_ON_SIDE: _count_on_side,
    Category.LOCALISE: _localise,
    Category.COUNT_LEFT_OF: _count_left_of,
}
