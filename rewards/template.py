"""A reward of your own: copy this file, rename the function, and put its import path into the
recipe.

    rewards:
      weights: {format: 0.2, accuracy: 0.7, "my_package.my_rewards:brevity": 0.1}

Test it first: ``avatar_rl.rewards.testing.check_reward(brevity)``.
"""

from __future__ import annotations

from collections.abc import Sequence

from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.format import extract_answer
from avatar_rl.rewards.answers.text import words
from avatar_rl.rewards.record import Completion

#: Words an answer may have before it starts to lose.
FREE_WORDS = 12


def brevity(prompt: Prompt, completions: Sequence[Completion]) -> list[float | None]:
    """1 for an answer of up to 12 words, falling to 0 at twice that; None (unscored) without an
    answer."""
    scores: list[float | None] = []
    for completion in completions:
        answer = extract_answer(completion.text)
        if answer is None:
            scores.append(None)
        else:
            scores.append(max(0.0, min(1.0, 2.0 - len(words(answer)) / FREE_WORDS)))
    return scores
