"""The parity probe: before training, rollout and learner side must see the same tokens and the same
probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from avatar_rl.actors.config import SamplingConfig
from avatar_rl.actors.rollout import ProbeCompletion
from avatar_rl.cluster.training.system import System
from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.pool import Pool, unwrap
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet
from avatar_rl.common.errors import ModelError

if TYPE_CHECKING:
    from avatar_rl.learner.rank import ProbeScores

DEFAULT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.05}
PROBE_TOKENS = 32


@dataclass(frozen=True)
class Parity:
    """What the probe found. The difference is absolute, in natural-log units per token."""

    prompts: int
    tokens: int
    max_difference: float


def probe_parity(
    system: System,
    fleet: RolloutFleet,
    learner: LearnerGroup,
    prompt_ids: Sequence[str],
    dtype: str,
) -> None:
    """Ask both sides and compare, unless ``probe.prompts`` is 0.

    Raises ModelError when they differ, and ResourceError when actors die too often meanwhile.
    """
    import ray

    probe = system.config.probe
    if probe.prompts == 0:
        return
    system.screen.phase("parity probe", f"{probe.prompts} prompts on both sides")
    while True:
        try:
            asked, seen = _ask_both(
                system.pool, prompt_ids[: probe.prompts], system.config.rollout.sampling
            )
            break
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from error
        except ray.exceptions.RayActorError:  # the dead are replaced
            fleet.await_ready()
            learner.await_ready([rank.progress.remote() for rank in system.pool.ranks])
    parity = check_parity(asked, seen, tolerance=probe.tolerance or DEFAULT_TOLERANCE[dtype])
    message = f"{parity.tokens} tokens agree within {parity.max_difference:.1e}"
    system.report("parity probe", message)


def _ask_both(
    pool: Pool, prompt_ids: Sequence[str], sampling: SamplingConfig
) -> tuple[list[ProbeCompletion], list[ProbeScores]]:
    """Completions of the first rollout actor, and the learner's view of them. Raises Ray's
    errors."""
    import ray

    tokens = min(PROBE_TOKENS, sampling.max_tokens)
    asked: list[ProbeCompletion] = ray.get(
        next(iter(pool.rollouts.values())).probe.remote(list(prompt_ids), tokens)
    )
    items = [{**item, "temperature": sampling.temperature} for item in asked]
    [seen, *_] = ray.get([rank.probe.remote(items) for rank in pool.ranks])
    return asked, seen


def check_parity(
    rollout: Sequence[ProbeCompletion], learner: Sequence[ProbeScores], *, tolerance: float
) -> Parity:
    """Compare the rollout side's probe completions with the learner's view of them, prompt by
    prompt.

    Raises ModelError naming the prompt and what differs, or when nothing was generated.
    """
    if rollout and not any(item["text"].strip() for item in rollout):
        raise ModelError(
            f"all {len(rollout)} probe completions are empty: the model ends its turn at once. "
            "Check its template, its generation_config and that it was fine-tuned for this prompt "
            "format"
        )
    differences = []
    for asked, seen in zip(rollout, learner, strict=True):
        name = asked["prompt_id"]
        mine, theirs = np.asarray(seen["prompt_token_ids"]), np.asarray(asked["prompt_token_ids"])
        if len(mine) != len(theirs):
            raise ModelError(
                f"prompt {name!r}: the engine expands it to {len(theirs)} tokens, the learner to "
                f"{len(mine)} (placeholders on the learner side: {seen['placeholders']}): pixel "
                "bounds or frame rates differ"
            )
        if not np.array_equal(mine, theirs):
            at = int(np.flatnonzero(mine != theirs)[0])
            raise ModelError(
                f"prompt {name!r}: token {at} is {theirs[at]} for the engine and {mine[at]} for "
                "the learner"
            )
        differences.append(np.abs(np.asarray(seen["logprobs"]) - np.asarray(asked["logprobs"])))
    together = np.concatenate(differences) if differences else np.zeros(1)
    worst = int(np.argmax([d.max() for d in differences])) if differences else 0
    if not together.max() <= tolerance:  # also true for NaN
        suspects = "media inputs, positions" if learner[worst]["placeholders"] else "positions"
        raise ModelError(
            f"prompt {rollout[worst]['prompt_id']!r}: log-probabilities of engine and learner "
            f"differ by up to {together.max():.2e} (allowed {tolerance:.0e}), by "
            f"{together.mean():.2e} on average: {suspects} or weights are not the same, or the "
            "model scores a completion otherwise beside others than alone. A single token far off "
            "beside a small average can be rounding in bfloat16: then raise probe.tolerance"
        )
    return Parity(len(rollout), together.size, float(together.max()))
