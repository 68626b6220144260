"""One part of a recipe laid over another: preset < recipe < stage < command line."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.common.types import Json, JsonObject
from avatar_rl.rewards.config import STAGE_WEIGHTS

#: Some keys of a recipe, laid over others.
Overlay = JsonObject

#: Keys that exclude each other: who gives one takes the other out of what lies below.
_RIVALS = (("data.reader.frames", "data.reader.fps"), ("data.reader.fps", "data.reader.frames"))


def merge(base: Overlay, over: Overlay) -> Overlay:
    """``over`` laid on ``base``, dictionaries merged key by key, everything else replaced."""
    result = dict(base)
    for key, value in over.items():
        known = result.get(key)
        result[key] = (
            merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
        )
    return result


def lay(base: Overlay, over: Overlay, *, replaces_weights: bool = True) -> Overlay:
    """``merge``, but that nothing of ``base`` remains where ``over`` means to replace it.

    Reward weights replace those below, also when one is given as weights and the other as
    `rewards.stage`; so do frames and fps of a video. ``replaces_weights`` false: weights join those
    below, as single keys of a command line do.
    """
    return merge(beneath(base, over, replaces_weights=replaces_weights), over)


def beneath(base: Overlay, over: Overlay, *, replaces_weights: bool = True) -> Overlay:
    """``base`` without what ``over`` means to replace as a whole; see ``lay``."""
    for given, rival in _RIVALS:
        if value_at(over, given) is not None:
            base = without(base, rival)
    if value_at(over, "rewards.stage") is not None:
        return without(base, "rewards.weights")
    if value_at(over, "rewards.weights") is not None:
        base = without(spelt_out(base), "rewards.stage")
        if replaces_weights:
            return without(base, "rewards.weights")
    return base


def spelt_out(overlay: Overlay) -> Overlay:
    """With the reward weights that `rewards.stage` stands for."""
    stage = value_at(overlay, "rewards.stage")
    if not isinstance(stage, int) or stage not in STAGE_WEIGHTS:
        return overlay
    return merge(overlay, {"rewards": {"weights": dict(STAGE_WEIGHTS[stage])}})


def nested(key: str, value: Json) -> Overlay:
    """The overlay that sets one dotted key."""
    *parents, leaf = key.split(".")
    overlay: Overlay = {leaf: value}
    for part in reversed(parents):
        overlay = {part: overlay}
    return overlay


def value_at(overlay: Overlay, key: str) -> Json:
    """What stands at a dotted key; None where nothing does."""
    found: Json = overlay
    for part in key.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def has(overlay: Overlay, key: str) -> bool:
    """Whether a dotted key is given, be it null."""
    parent, _, leaf = key.rpartition(".")
    found = value_at(overlay, parent) if parent else overlay
    return isinstance(found, dict) and leaf in found


def without(overlay: Overlay, key: str) -> Overlay:
    """``overlay`` but for a dotted key."""
    head, _, rest = key.partition(".")
    if head not in overlay:
        return overlay
    inner = overlay[head]
    kept = {name: value for name, value in overlay.items() if name != head}
    if not rest:
        return kept
    return overlay | {head: without(inner, rest)} if isinstance(inner, dict) else overlay


def leaves(overlay: Overlay, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Dotted keys and values of an overlay; an empty mapping is a value."""
    for key, value in overlay.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
