"""Rewards that compare a completion with others of its prompt (docs/method.md 1.5, 2.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from avatar_rl.common.scoring import Completion
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.answers.accuracy import canonical_answer
from avatar_rl.rewards.answers.format import extract_answer
from avatar_rl.rewards.config import ATTENTION_BONUS


def attention_score(both: float, video: float, audio: float, *, strict: bool) -> float:
    """r_attn of OmniVideo-R1 (docs/method.md 2.2), from three answer scores.

    0.3 if the audio-visual score is at least both unimodal ones (``strict``: above both), else 0.
    """
    best = max(video, audio)
    return ATTENTION_BONUS if (both > best if strict else both >= best) else 0.0


def self_consistency_scores(
    prompt: Prompt, completions: Sequence[Completion], *, max_answer_chars: int
) -> list[float]:
    """1 for every completion whose answer won the vote over these fresh completions, else 0.

    Answers are compared in their normal form (docs/method.md 1.5). A tie goes to the answer with
    the higher log-probability per token over all completions that gave it. A tie of that goes to
    the one given first. Without a usable answer there is no vote, and 0.
    """
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
