"""Places of media in a question, and tokens of models that must not stand in its text."""

from __future__ import annotations

import re

from avatar_rl.common.errors import InputError
from avatar_rl.common.text import shortened
from avatar_rl.prompts.record import MediaPlan

PLACE = re.compile(r"<(video|audio|image)>")
_MEDIUM = r"(?:video|audio|image|img|vid|picture|speech|sound|media)"
_PART = r"(?:placeholder|pad|token|here|start|end|soft_token|file)"
#: Places as other projects write them: <image_1>, <IMAGE>, <ImageHere>, <start_of_image>, [image].
_OTHER_PLACE = re.compile(
    rf"(?i)</?(?:start_of_|end_of_)?{_MEDIUM}s?(?:[ _-]?(?:\d+|{_PART}))*\s*/?>"
    rf"|\[{_MEDIUM}(?:[ _-]?(?:\d+|{_PART}))*\]"
)
_TOKEN = re.compile(r"<\|[\w-]{1,30}\|>|<\uff5c[^<>]{1,40}\uff5c>")


def check_places(asked: str, plan: MediaPlan, where: str) -> None:
    """Raises InputError where the places in question and options are not those of the media, one
    for one, or are written as another project writes them."""
    places = PLACE.findall(asked)
    kinds = [item.kind for item in plan.items]
    if plan.audio_in_video:  # the sound has no place of its own
        kinds = [kind for kind in kinds if kind != "audio"]
    if plan.in_text and places != kinds:
        raise InputError(
            where,
            f"the places in the question are {shortened(str(places))}, the media "
            f"{shortened(str(kinds))}",
            "write one <video>, <audio> or <image> for each medium, in their order",
        )
    if places and not plan.in_text:
        raise InputError(
            where,
            f"the question holds <{places[0]}>, but its media stand in front of it",
            "set media.in_text to true, or drop the tag",
        )
    other = next(iter(_OTHER_PLACE.findall(PLACE.sub("", asked))), None)
    if other is not None and plan.items:
        raise InputError(
            where,
            f"the question holds {other}, which is no place that is read",
            "write <video>, <audio> or <image> where the medium belongs, or drop it",
        )


def check_tokens(name: str, text: str | None, where: str) -> None:
    """Raises InputError for a token of a chat format: it would end the turn, or open a medium."""
    if text is not None and (token := _TOKEN.search(text)):
        raise InputError(
            where,
            f"the {name} holds {token[0]}, a token of a chat format",
            "give the plain text: the model's own template adds the tokens",
        )
