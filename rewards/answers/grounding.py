"""The query-intensive output of OmniVideo-R1: time-caption segments, then reasoning and answer
(docs/method.md 2.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from avatar_rl.rewards.answers.format import completed

MAX_SEGMENTS = 8
_OPENING = "<time>"
# Bounded repeats and no nested quantifier: linear in the text.
_SPAN = re.compile(r"\s{0,8}(\d{1,6}(?:\.\d{1,6})?)\s{0,4}-\s{0,4}(\d{1,6}(?:\.\d{1,6})?)\s{0,8}")
_STRICT_SPAN = re.compile(r"(\d{1,6}\.\d)-(\d{1,6}\.\d)")


@dataclass(frozen=True, slots=True)
class Segment:
    """A captioned stretch of the media, in seconds; ``valid`` only with 0 <= start < end and a
    caption."""

    start: float
    end: float
    caption: str

    @property
    def valid(self) -> bool:
        return 0.0 <= self.start < self.end and bool(self.caption)


@dataclass(frozen=True, slots=True)
class Grounded:
    """A parsed output; unreadable segments stay in ``segments`` as None, so that they count as
    invalid."""

    segments: tuple[Segment | None, ...]
    strict: bool
    lenient: bool


def _between(text: str, opening: str, closing: str) -> tuple[str, str] | None:
    """(content, remainder) of a block that starts the text after white space; None if it does
    not."""
    text = text.lstrip()
    if not text.startswith(opening):
        return None
    content, closed, rest = text[len(opening) :].partition(closing)
    return (content, rest) if closed else None


def _segment(span: str, caption: str) -> Segment | None:
    match = _SPAN.fullmatch(span)
    return Segment(float(match[1]), float(match[2]), caption.strip()) if match else None


def _read_segments(text: str) -> tuple[list[tuple[str, str]], str]:
    """The leading run of (time text, caption text), one over the limit at most, and what follows
    it."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) <= MAX_SEGMENTS and (time := _between(text, _OPENING, "</time>")) is not None:
        caption = _between(time[1], "<caption>", "</caption>")
        if caption is None:
            break
        pairs.append((time[0], caption[0]))
        text = caption[1]
    return pairs, text


def _scattered(text: str) -> list[tuple[str, str]]:
    """The (time text, caption text) pairs up to the end of the reasoning, at most the first 8.

    A time without a caption behind it is a mention and no segment."""
    end = text.rfind("</thinking>")
    text = text[: end if end >= 0 else len(text)]
    pairs: list[tuple[str, str]] = []
    at = text.find(_OPENING)
    while at >= 0 and len(pairs) < MAX_SEGMENTS:
        # a piece that ends with the next opening: linear, whatever is left unclosed
        following = text.find(_OPENING, at + len(_OPENING))
        piece = text[at : following if following >= 0 else len(text)]
        time = _between(piece, _OPENING, "</time>")
        caption = _between(time[1], "<caption>", "</caption>") if time else None
        if time and caption:
            pairs.append((time[0], caption[0]))
        at = following
    return pairs


def _strict_tail(text: str) -> bool:
    thinking = _between(text, "<thinking>", "</thinking>")
    answer = _between(thinking[1], "<answer>", "</answer>") if thinking else None
    return bool(
        thinking and answer and thinking[0].strip() and answer[0].strip() and not answer[1].strip()
    )


def parse_grounded(text: str, prefilled: bool | None = False, *, along: bool = False) -> Grounded:
    """Read an output. All work is linear in the text; at most the first 8 segments are kept.

    ``strict`` (docs/method.md 2.1): the whole string is 1 to 8 segments, each "s.s-e.e" with one
    decimal, valid, ordered and disjoint, with a caption, then one thinking and one answer block.
    ``lenient``: at least one segment and, anywhere after the first, a thinking and an answer block.
    With ``along``, segments may also stand in the reasoning, and anything between them.
    ``prefilled``: the prompt ended with the opening thinking tag, so it is missing behind the
    segments; None: not known, so either is right.
    """
    first = text.find(_OPENING)
    pairs, rest = _read_segments(text[first:] if first >= 0 else "")
    before = text[: max(first, 0)]
    thought = completed(rest, "<thinking>", prefilled)
    text, rest = text.removesuffix(rest) + thought, thought
    segments = tuple(_segment(*pair) for pair in pairs[:MAX_SEGMENTS])
    tags = ("<thinking>", "</thinking>", "<answer>", "</answer>")
    once = all(text.count(tag) == 1 for tag in tags) and text.count(_OPENING) == len(pairs)
    written_well = all(_STRICT_SPAN.fullmatch(span) for span, _ in pairs)
    strict = (
        1 <= len(pairs) <= MAX_SEGMENTS
        and once
        and written_well
        and not before.strip()
        and ordered(segments)
        and _strict_tail(rest)
    )
    if along:
        thought = completed(text, "<thinking>", prefilled)
        pairs = _scattered(thought)
        segments = tuple(_segment(*pair) for pair in pairs)
        rest = thought
    places = [rest.find(tag) for tag in tags]
    return Grounded(
        segments, strict, lenient=bool(pairs) and places[0] >= 0 and places == sorted(places)
    )


def ordered(segments: Sequence[Segment | None]) -> bool:
    """Whether all segments are valid, in order of time, and disjoint (touching is allowed)."""
    end = 0.0
    for segment in segments:
        if segment is None or not segment.valid or segment.start < end:
            return False
        end = segment.end
    return True
