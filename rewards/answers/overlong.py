"""DAPO's soft punishment of overlong completions (docs/method.md 3)."""

from __future__ import annotations


def overlong_score(tokens: int, *, limit: int, share: float) -> float:
    """0 up to ``limit * (1 - share)`` tokens, then linearly down to -1 at ``limit`` and beyond.

    Args:
        tokens: Length of the completion.
        limit: Longest completion, in tokens.
        share: Part of the limit over which the punishment grows, in (0, 1].
    """
    soft = limit * share
    return max(-1.0, min(0.0, (limit - soft - tokens) / soft))
