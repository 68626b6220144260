"""The output format `<think>...</think><answer>...</answer>` (docs/method.md 1.5). Linear in the
text: no regex."""

from __future__ import annotations

from typing import Literal

FormatScale = Literal["signed", "binary"]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_ENDS = ("</think>", "</thinking>")


def completed(text: str, tag: str, prefilled: bool | None) -> str:
    """``text`` with the opening tag that its prompt ended with, as templates of thinking models do.

    ``prefilled`` None: not known, so the tag is added where the text has none."""
    return tag + text if prefilled or (prefilled is None and tag not in text) else text


def well_formed(text: str, prefilled: bool | None = False) -> bool:
    """Whether the whole text is one think block and one answer block, both non-blank; white space
    around is allowed.

    Each tag occurs exactly once, so nested or repeated blocks fail: an answer cannot be hedged by
    giving two. ``prefilled``: the prompt ended with the opening think tag, see ``completed``."""
    text = completed(text, "<think>", prefilled)
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    before, rest = text.split("<think>")
    think, _, rest = rest.partition("</think>")
    between, opened, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    return bool(
        opened
        and closed
        and think.strip()
        and answer.strip()
        and not (before.strip() or between.strip() or after.strip())
    )


def format_score(
    text: str, *, finished: bool, scale: FormatScale, prefilled: bool | None = False
) -> float:
    """+1 or -1 (``signed``), 1 or 0 (``binary``). A truncated completion fails."""
    if finished and well_formed(text, prefilled):
        return 1.0
    return -1.0 if scale == "signed" else 0.0


def extract_answer(text: str) -> str | None:
    """Stripped content of the only answer block after the reasoning; None without one, or with
    several.

    What the reasoning quotes is not the answer: only text after the last closing think tag is
    searched."""
    start = max(text.rfind(tag) + len(tag) if tag in text else 0 for tag in _THINK_ENDS)
    tail = text[start:]
    if tail.count("<answer>") != 1 or tail.count("</answer>") != 1:
        return None
    inside = tail.partition("<answer>")[2]
    answer, closed, _ = inside.partition("</answer>")
    return answer.strip() or None if closed else None


def think_text(text: str) -> str:
    """The reasoning: the first think block's content, or what precedes the answer where the tags
    are missing. A closing tag alone ends what the prompt opened."""
    for opening, closing in (("<think>", "</think>"), ("<thinking>", "</thinking>")):
        if opening in text:
            return text.partition(opening)[2].partition(closing)[0].strip()
        if closing in text:
            return text.partition(closing)[0].strip()
    return text.partition("<answer>")[0].strip()
