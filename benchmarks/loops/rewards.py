"""Rewards of benchmarks/loop.py, the same functions for both sides."""

from __future__ import annotations

import re
from collections.abc import Sequence

from avatar_rl.common.scoring import Completion
from avatar_rl.prompts.record import Prompt

WORD = re.compile(r"w(\d{4})")
ANSWER = re.compile(r"<answer>(.*?)</answer>")


def even_share(text: str) -> float:
    """Share of a completion's words that have an even number."""
    numbers = [int(number) for number in WORD.findall(text)]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))


def answers(text: str, truth: str) -> float:
    """1 where the first answer of a completion is ``truth``."""
    found = ANSWER.search(text)
    return float(found is not None and found[1].strip() == truth)


def even_words(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
    """``even_share`` as a reward of this project."""
    return [even_share(completion.text) for completion in completions]


def right_colour(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
    """``answers`` as a reward of this project."""
    return [answers(completion.text, prompt.answer) for completion in completions]
