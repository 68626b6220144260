"""Agreement with the majority of the group (docs/method.md 1.5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.accuracy import canonical_answer
from avatar_rl.rewards.answers.format import extract_answer
from avatar_rl.rewards.record import Completion


def self_consistency_scores(
    prompt: Prompt, completions: Sequence[Completion], *, max_answer_chars: int
) -> list[float]:
    """1 for every completion whose normalised answer won the vote over these fresh completions,
    else 0.

    A tie goes to the answer with the higher log-probability per token over all completions that
    gave it, and a tie of that to the one given first. No (usable) answer: no vote, and 0."""
    answers = [_vote(prompt, completion.text, max_answer_chars) for completion in completions]
    voters: dict[Hashable, list[Completion]] = defaultdict(list)
    for answer, completion in zip(answers, completions, strict=True):
        if answer is not None:
            voters[answer].append(completion)
    if not voters:
        return [0.0] * len(completions)
    winner = max(
        voters, key=lambda answer: (len(voters[answer]), _logprob_per_token(voters[answer]))
    )
    return [float(answer == winner) for answer in answers]


def _vote(prompt: Prompt, text: str, max_answer_chars: int) -> Hashable | None:
    answer = extract_answer(text)
    if answer is None or len(answer) > max(max_answer_chars, 4 * len(prompt.answer)):
        return None
    return canonical_answer(prompt, answer)


def _logprob_per_token(completions: Sequence[Completion]) -> float:
    tokens = sum(completion.tokens for completion in completions)
    return sum(completion.mean_logprob * completion.tokens for completion in completions) / max(
        tokens, 1
    )
