"""The engine's side of the parity probe: completions outside the stream, for the learner to compare
with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from avatar_rl.actors.config import RequestSampling
from avatar_rl.prompts.record import Prompt

if TYPE_CHECKING:
    from avatar_rl.actors.engine.engine import RolloutEngine
    from avatar_rl.prompts.encoding.template import PromptEncoder


def probe(
    engine: RolloutEngine,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    sampling: RequestSampling,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """One completion of each prompt, in order: token ids (T,), log-probabilities (T,), prompt ids,
    text.

    The engine must be idle.
    """
    for number, prompt in enumerate(prompts):
        engine.submit(
            prompt.id, encoder.engine_input(prompt, hinted=False), sampling, seed=seed + number
        )
    answers = {}
    while engine.in_flight:
        for finished in engine.step():
            completion = finished.completions[0]
            answers[finished.request_id] = {
                "prompt_id": finished.request_id,
                "prompt_token_ids": np.asarray(finished.prompt_token_ids, dtype=np.int32),
                "token_ids": completion.token_ids,
                "logprobs": completion.logprobs,
                "text": completion.text,
            }
    return [answers[prompt.id] for prompt in prompts]
