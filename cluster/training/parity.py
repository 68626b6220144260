"""The parity probe: before training, rollout and learner side must see the same tokens and the same
probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from avatar_rl.actors.config import SamplingConfig
from avatar_rl.actors.rollout import ProbeCompletion
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.training.system import System
from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.pool import Pool, unwrap
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet
from avatar_rl.cluster.workers.turns import Turns
from avatar_rl.common.errors import ModelError

if TYPE_CHECKING:
    from avatar_rl.learner.rank import ProbeScores

#: Of 99 in 100 tokens. Single ones may be far off in bfloat16, whose rounding is 0.03 a token.
DEFAULT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.05}
QUANTILE = 0.99
#: The average of any one prompt may be this share of the tolerance.
MEAN_SHARE = 0.25
PROBE_TOKENS = 32
#: Prompts that may be looked at for each that is wanted: some are set aside.
CANDIDATES = 8
#: After an update the average over at least so many tokens may be this share of it.
LEAST_TOKENS = 32
ADOPTED_SHARE = 0.5


@dataclass(frozen=True)
class Parity:
    """What the probe found. Differences are absolute, in natural-log units per token."""

    prompts: int
    tokens: int
    mean: float  # of the prompt that differs most on average
    p99: float  # of all tokens
    max_difference: float


def parity_tolerance(config: RunConfig, dtype: str) -> float | None:
    """Allowed difference of 99 in 100 tokens; None where the probe is off."""
    probe = config.probe
    return probe.tolerance or DEFAULT_TOLERANCE[dtype] if probe.prompts else None


def probe_parity(
    system: System,
    fleet: RolloutFleet,
    learner: LearnerGroup,
    prompt_ids: Sequence[str],
    dtype: str,
    turns: Turns,
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
            turns.rollouts()
            if turns.alternate:
                fleet.await_ready()  # one that died in the learner's turn is there again
            sampling = system.config.rollout.sampling
            asked = _ask_rollouts(system.pool, prompt_ids, probe.prompts, sampling)
            turns.learner()
            seen = _ask_learner(system.pool, asked, sampling)
            break
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from error
        except ray.exceptions.RayActorError:  # the dead are replaced
            turns.rollouts()
            fleet.await_ready()
            turns.learner()
            learner.await_ready([rank.progress.remote() for rank in system.pool.ranks])
    tolerance = parity_tolerance(system.config, dtype)
    assert tolerance is not None  # it probes
    parity = check_parity(asked, seen, tolerance=tolerance)
    message = (
        f"{parity.tokens} tokens agree: mean {parity.mean:.1e}, p99 {parity.p99:.1e}, "
        f"max {parity.max_difference:.1e}"
    )
    system.report("parity probe", message)


def check_adopted(metrics: Mapping[str, float], tolerance: float) -> None:
    """Whether rollouts sample from the weights that were published, after every step.

    An update in place can leave packed weights as they were, or put them wrong; the engine then
    goes on without a word. Raises ModelError when a step's on-policy tokens say so.
    """
    gap, tokens = metrics.get("mismatch/on_policy"), metrics.get("mismatch/on_policy_tokens", 0)
    if gap is None or tokens < LEAST_TOKENS or gap <= ADOPTED_SHARE * tolerance:
        return
    raise ModelError(
        f"the engine's log-probabilities of {tokens:.0f} tokens, generated with the weights of the "
        f"version that was trained, are {gap:.2e} off the learner's on average (allowed "
        f"{ADOPTED_SHARE * tolerance:.0e}): an update of the weights in place has left something "
        "stale. Use a vLLM that the corrections were checked on (docs/dependencies.md); where it "
        "can only be the dtype's rounding, raise probe.tolerance"
    )


def _ask_rollouts(
    pool: Pool, prompt_ids: Sequence[str], wanted: int, sampling: SamplingConfig
) -> list[ProbeCompletion]:
    """Completions of the first rollout actor, of the first ``wanted`` prompts that can be trained
    on. Raises Ray's errors."""
    import ray

    tokens = min(PROBE_TOKENS, sampling.max_tokens)
    first = next(iter(pool.rollouts.values()))
    candidates = list(prompt_ids[: CANDIDATES * wanted])
    asked: list[ProbeCompletion] = ray.get(first.probe.remote(candidates, wanted, tokens))
    return asked


def _ask_learner(
    pool: Pool, asked: Sequence[ProbeCompletion], sampling: SamplingConfig
) -> list[ProbeScores]:
    """The learner's view of these completions. Raises Ray's errors."""
    import ray

    items = [{**item, "temperature": sampling.temperature} for item in asked]
    scores: list[list[ProbeScores]]
    scores = ray.get([rank.probe.remote(items) for rank in pool.ranks])
    return scores[0]


def check_parity(
    rollout: Sequence[ProbeCompletion], learner: Sequence[ProbeScores], *, tolerance: float
) -> Parity:
    """Compare the rollout side's probe completions with the learner's view of them, prompt by
    prompt.

    99 in 100 tokens must agree within ``tolerance``, and each prompt on average within a quarter of
    it: one token far off may be rounding. Raises ModelError naming the prompt and what differs, or
    when nothing was generated.
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
    # A completion may be empty.
    averages = [float(d.mean()) if d.size else 0.0 for d in differences] or [0.0]
    worst = int(np.argmax(averages))  # a NaN counts as the largest
    parity = Parity(
        len(rollout),
        together.size,
        averages[worst],
        float(np.quantile(together, QUANTILE, method="lower")),
        float(together.max()),
    )
    # Comparisons that are also false for NaN.
    if not (parity.p99 <= tolerance and parity.mean <= MEAN_SHARE * tolerance):
        suspects = "media inputs, positions" if learner[worst]["placeholders"] else "positions"
        raise ModelError(
            f"prompt {rollout[worst]['prompt_id']!r}: log-probabilities of engine and learner "
            f"differ by {parity.mean:.2e} on average (allowed {MEAN_SHARE * tolerance:.1e}); of "
            f"all tokens 99 in 100 by up to {parity.p99:.2e} (allowed {tolerance:.0e}), the worst "
            f"by {parity.max_difference:.2e}: {suspects} or weights are not the same, or the model "
            "scores a completion otherwise beside others than alone. Where it can only be the "
            "dtype's rounding, raise probe.tolerance"
        )
    return parity
