"""A saved row as the page may rely on it: fields of the types that docs/output.md gives. What a
foreign or older file has in another form is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import cast

from avatar_rl.cluster.telemetry.run_files import Sample
from avatar_rl.cluster.telemetry.samples import PER_TOKEN
from avatar_rl.common.types import Json, JsonObject


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_null(value: Json) -> bool:
    return value is None or _is_number(value)


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _is_flag(value: Json) -> bool:
    return isinstance(value, bool)


def _are(check: Callable[[Json], bool]) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _are_named(check: Callable[[Json], bool]) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, dict) and all(check(item) for item in value.values())


def _is_part(value: Json) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(item) for item in value)


_TEXTS = ("prompt_id", "type", "category", "question", "answer", "hint", "id", "group", "text")
_NUMBERS = ("reward", "accuracy", "advantage", "baseline", "age", "tokens", "version")
_FLAGS = ("replayed", "hinted", "imputed", "dead_before", "dead_after", "tokens_left_out")
CHECKS: Mapping[str, Callable[[Json], bool]] = {
    **dict.fromkeys((*_TEXTS, "tier", "finish_reason"), _is_text),
    **dict.fromkeys((*_NUMBERS, "temperature"), _is_number_or_null),
    **dict.fromkeys(_FLAGS, _is_flag),
    **dict.fromkeys(("options", "needs"), _are(_is_text)),
    **dict.fromkeys(("components", "details"), _are_named(_is_number_or_null)),
    **dict.fromkeys(PER_TOKEN, _are(_is_number_or_null)),
    "versions": _are(_is_part),
    "media": lambda value: isinstance(value, list),
}


def clean(row: JsonObject) -> Sample:
    """``row`` without fields of another type; lists per token only where they fit the text."""
    kept = {name: value for name, value in row.items() if name in CHECKS and CHECKS[name](value)}
    kept["text"] = kept.get("text", "")
    if not _fits(kept):
        kept = {name: value for name, value in kept.items() if name not in PER_TOKEN}
    return cast(Sample, kept)


def _fits(row: JsonObject) -> bool:
    """Token ends rise up to the end of the text, and every list per token is as long."""
    ends, text = row.get("token_ends"), row["text"]
    if not isinstance(ends, list) or not isinstance(text, str):
        return False
    if not all(isinstance(end, int) for end in ends):
        return False
    numbers = cast("list[int]", [0, *ends])
    rises = all(before <= after for before, after in pairwise(numbers))
    lists = [value for name in PER_TOKEN if isinstance(value := row.get(name), list)]
    return rises and numbers[-1] <= len(text) and all(len(one) == len(ends) for one in lists)
