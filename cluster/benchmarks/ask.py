"""Parts that the readers of several sets share: media, options, and the gold answer as a letter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.benchmarks.folder import SetRow
from avatar_rl.common.text import normalise
from avatar_rl.prompts.choices import lettered, split_option
from avatar_rl.prompts.record import MediaItem

LETTER_ONLY = "Answer with the option's letter from the given choices directly."


def video(path: Path, *, clip: tuple[float, float] | None = None) -> MediaItem:
    return MediaItem(kind="video", uri=str(path.resolve()), clip=clip)


def audio(path: Path) -> MediaItem:
    return MediaItem(kind="audio", uri=str(path.resolve()))


def image(path: Path) -> MediaItem:
    return MediaItem(kind="image", uri=str(path.resolve()))


def options_of(row: SetRow, *names: str) -> tuple[str, ...]:
    """The row's options as "A. red". An object's keys are the letters."""
    value = row.need(*names)
    if isinstance(value, dict):
        given = {key: text for key, text in value.items() if text not in (None, "")}
        return tuple(f"{key}. {str(given[key]).strip()}" for key in sorted(given))
    return lettered(row.texts(*names))


def gold_letter(row: SetRow, options: Sequence[str], *names: str) -> str:
    """The right option's letter, however the set writes it: letter, number from 0, or its words.

    What is none of the options stays as it is: ``read_questions`` names all such rows at once."""
    value = row.need(*names)
    letters = [split_option(option)[0] for option in options]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return letters[value]
    text = str(value).strip()
    letter = text.strip("().").upper()
    if letter in letters:
        return letter
    words = normalise(split_option(text)[1] if split_option(text)[0] in letters else text)
    named = [x for x, option in map(split_option, options) if normalise(option) == words]
    if len(named) >= 1:
        return named[0]
    return text


def gold_number(row: SetRow, *names: str) -> str:
    """The truth as a plain number: "4" of 4.0. What is none stays as it is, as in
    ``gold_letter``."""
    text = row.text(*names)
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def joined(*lines: str) -> str:
    return "\n".join(line for line in lines if line)
