"""The policy that ratios are taken against (docs/method.md 1.1), against numpy."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from avatar_rl.learner.config import ObjectiveConfig
from avatar_rl.learner.objective.loss import LossOutput, StepTotals, policy_loss
from avatar_rl.learner.old_logprobs import OldLogprobs

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
REPLAY = torch.tensor([False, False, True, True])
ADVANTAGES = torch.tensor([1.2, -0.7, 0.9, -1.1], dtype=torch.float64)


def arrays(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(MASK.shape, generator=generator, dtype=torch.float64)

    behaviour = -1 - noise(1.0).abs()
    old = behaviour + noise(0.6)
    return {"behaviour": behaviour, "old": old, "current": old + noise(0.2)}


def loss_of(step: dict[str, Tensor], config: ObjectiveConfig) -> tuple[LossOutput, Tensor]:
    current = step["current"].clone().requires_grad_()
    output = policy_loss(
        current,
        step["behaviour"],
        MASK,
        ADVANTAGES,
        torch.ones(MASK.shape, dtype=torch.float64),
        REPLAY,
        None,
        config,
        totals=StepTotals.count(MASK.sum(1), REPLAY, config),
        old_logprobs=step["old"],
    )
    return output, torch.autograd.grad(output.loss, current)[0]


def numpy_loss(step: dict[str, Tensor], *, per_sequence: bool, rejected: set[int]) -> float:
    """Grouped by hand from the text: fresh rows over old with min(old / behaviour, 2), replayed
    rows over behaviour with no weight."""
    current, old, behaviour = (step[name].numpy() for name in ("current", "old", "behaviour"))
    kinds: dict[bool, list[float]] = {False: [], True: []}
    for row in range(4):
        n = int(MASK[row].sum())
        replayed = bool(REPLAY[row])
        base = behaviour[row, :n] if replayed else old[row, :n]
        log_ratio = current[row, :n] - base
        rho = np.exp(np.full(n, log_ratio.mean()) if per_sequence else log_ratio)
        weight = np.ones(n) if replayed else np.minimum(np.exp(old - behaviour)[row, :n], 2.0)
        if row in rejected:
            weight = np.zeros(n)
        advantage = float(ADVANTAGES[row])
        terms = weight * np.minimum(rho * advantage, np.clip(rho, 0.8, 1.2) * advantage)
        kinds[replayed].append(float(terms.mean()))
    return -(np.mean(kinds[False]) + 0.6 * np.mean(kinds[True]))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_fresh_rows_take_the_trainers_old_and_replays_the_behaviour(ratio: Any) -> None:
    step = arrays()
    config = ObjectiveConfig(ratio=ratio, beta=0, tas_lambda=0)
    output, _ = loss_of(step, config)
    expected = numpy_loss(step, per_sequence=ratio == "sequence", rejected=set())
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)
    weight = output.tokens.weight
    assert weight[REPLAY].eq(1).all()  # no weight twice: their ratio carries it
    assert (weight[~REPLAY] < 1).any() and weight.max() <= 2
    replays = output.tokens.ratio[REPLAY] * MASK[REPLAY]
    assert torch.equal(
        replays,
        loss_of(step | {"old": step["current"]}, config)[0].tokens.ratio[REPLAY] * MASK[REPLAY],
    )


def test_current_takes_the_policy_itself_for_replays_too() -> None:
    step = arrays()
    step["old"] = step["current"]
    output, _ = loss_of(step, ObjectiveConfig(old_logprobs="current", beta=0, tas_lambda=0))
    keep = MASK.bool()
    assert torch.allclose(output.tokens.ratio[keep], torch.ones(1, dtype=torch.float64))
    expected = (step["current"] - step["behaviour"]).exp().clamp(max=2)
    assert torch.allclose(output.tokens.weight[keep], expected[keep])


@pytest.mark.parametrize(("rejection", "threshold"), [("geometric", 1.2), ("k3", 0.05)])
def test_a_rejected_completion_has_no_policy_gradient(rejection: Any, threshold: float) -> None:
    step = arrays(3)
    gap = (step["old"] - step["behaviour"]).numpy()
    lengths = MASK.sum(1).tolist()
    rows = [gap[row, : lengths[row]] for row in (0, 1)]  # replays are never rejected
    measure = {
        "geometric": [np.exp(abs(row.mean())) for row in rows],
        "k3": [(np.exp(row) - 1 - row).mean() for row in rows],
    }[rejection]
    threshold = sum(measure) / 2  # one of the two is beyond it
    rejected = {row for row in (0, 1) if measure[row] > threshold}
    assert len(rejected) == 1
    config = ObjectiveConfig(
        rejection=rejection, rejection_threshold=threshold, beta=0, tas_lambda=0
    )
    output, gradient = loss_of(step, config)
    assert set(output.tokens.rejected.nonzero().flatten().tolist()) == rejected
    assert gradient[list(rejected)].eq(0).all()
    expected = numpy_loss(step, per_sequence=False, rejected=rejected)
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "dtype", "rule"),
    [
        ({}, "float32", "behaviour"),
        ({}, "bfloat16", "trainer"),
        ({}, "float16", "trainer"),
        ({"ratio": "sequence"}, "float32", "trainer"),
        ({"rejection": "k3"}, "float32", "trainer"),
        ({"old_logprobs": "behaviour", "ratio": "sequence"}, "bfloat16", "behaviour"),
        ({"old_logprobs": "current"}, "float32", "current"),
    ],
)
def test_auto_takes_the_trainers_where_the_sampler_is_too_coarse(
    options: dict[str, Any], dtype: str, rule: str
) -> None:
    assert ObjectiveConfig(**options).old_rule(dtype) == rule


def test_later_updates_see_the_start_of_the_step_on_every_rank() -> None:
    first, second = torch.randn(2, 5), torch.randn(2, 5)
    ranks = [OldLogprobs("trainer", updates=2, ranks=2) for _ in range(2)]
    notes: list[dict[str, Tensor]] = []
    for rank, old in enumerate(ranks):
        now = old.of([f"g.{rank}"], first[[rank]].requires_grad_(), MASK[[rank]])
        assert now is not None and torch.equal(now, first[[rank]]) and not now.requires_grad
        notes.append(dict(old._noted))

    def gather(out: list[dict[str, Tensor]], mine: dict[str, Tensor]) -> None:
        out[:] = notes

    with mock.patch("torch.distributed.all_gather_object", gather):
        for old in ranks:
            old.share()
    # Rank 0 has the other rank's completion now, and a replay that nobody has noted.
    found = ranks[0].of(["g.1", "r.0"], second, MASK[1:3])
    assert found is not None
    assert torch.equal(found[0, :3], first[1, :3].detach())
    assert torch.equal(found[1], second[1])
    with mock.patch("torch.distributed.all_gather_object") as again:
        ranks[0].share()
    again.assert_not_called()
