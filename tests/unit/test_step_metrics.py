"""Metrics of a step against numpy over the flat tokens, and merging."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from avatar_rl.cluster.telemetry.distributions import advantage_shares, loss_by_position
from avatar_rl.common.errors import DataError
from avatar_rl.learner.config import ObjectiveConfig
from avatar_rl.learner.objective.advantages import Advantages, rewards_tensor, step_advantages
from avatar_rl.learner.objective.loss import LossOutput, StepTotals, policy_loss
from avatar_rl.learner.objective.shaping import tas_weights
from avatar_rl.learner.objective.step_metrics import ADVANTAGE_EDGES, StepMetrics

LENGTHS = torch.tensor([6, 1, 9, 4, 3])
REPLAY = torch.tensor([0, 0, 1, 1, 0], dtype=torch.bool)
PROMPT_IDS = ["a", "b", "a", "c", "b"]  # "c" has a replay alone
CONFIG = ObjectiveConfig(old_logprobs="current")


def make() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of ``policy_loss`` and the entropy."""
    torch.manual_seed(0)
    shape = (5, 9)
    mask = (torch.arange(9) < LENGTHS[:, None]).double()
    old = -2 * torch.rand(shape, dtype=torch.float64)
    step = {
        "logprobs": old + 0.3 * torch.randn(shape, dtype=torch.float64),
        "behaviour_logprobs": old + 0.2 * torch.randn(shape, dtype=torch.float64),
        "mask": mask,
        "advantages": torch.randn(5, dtype=torch.float64),
        "tas": tas_weights(mask, dtype=torch.float64),
        "is_replay": REPLAY,
        "reference_logprobs": old,
        "old_logprobs": old,
    }
    return step, torch.rand(shape, dtype=torch.float64)


def loss_of(step: dict[str, torch.Tensor], rows: list[int]) -> LossOutput:
    part = {name: tensor[rows] for name, tensor in step.items()}
    totals = StepTotals.count(LENGTHS, REPLAY, CONFIG)
    return policy_loss(**part, config=CONFIG, totals=totals)  # type: ignore[arg-type]


def collect(splits: list[list[int]]) -> StepMetrics:
    """One accumulator per part, merged after a trip through pickle, as between ranks."""
    step, entropy = make()
    whole = StepMetrics()
    for rows in splits:
        part = StepMetrics()
        part.add(loss_of(step, rows), entropy[rows], [PROMPT_IDS[i] for i in rows])
        whole.merge(pickle.loads(pickle.dumps(part)))
    return whole


def test_metrics_equal_numpy_over_the_tokens() -> None:
    step, entropy = make()
    output = loss_of(step, [0, 1, 2, 3, 4])
    found = collect([[0, 1, 2, 3, 4]]).metrics()
    arrays = {name: tensor.numpy() for name, tensor in step.items()}
    for kind, rows in (("fresh", ~REPLAY), ("replay", REPLAY)):
        keep = step["mask"].bool() & rows[:, None]
        current, behaviour = arrays["logprobs"][keep], arrays["behaviour_logprobs"][keep]
        ratio = np.exp(current - arrays["old_logprobs"][keep])
        weight = ratio * np.minimum(np.exp(arrays["old_logprobs"][keep] - behaviour), 2.0)
        sign = np.broadcast_to(arrays["advantages"][:, None], keep.shape)[keep]
        clipped = ((ratio > 1.2) & (sign > 0)) | ((ratio < 0.8) & (sign < 0))
        gap = behaviour - current
        assert found[f"ratio/{kind}/mean"] == pytest.approx(ratio.mean(), abs=1e-12)
        assert found[f"ratio/{kind}/max"] == pytest.approx(ratio.max(), abs=1e-12)
        assert found[f"clip_fraction/{kind}"] == pytest.approx(clipped.mean(), abs=1e-12)
        assert 0 < clipped.mean() < 1
        assert found[f"ess/{kind}"] == pytest.approx(
            weight.sum() ** 2 / (len(weight) * (weight**2).sum()), abs=1e-12
        )
        assert found[f"kl/behaviour/{kind}"] == pytest.approx(
            (np.exp(gap) - gap - 1).mean(), abs=1e-12
        )
        capped = np.minimum(np.exp(gap) - gap - 1, 1.0)
        assert found[f"kl/behaviour_capped/{kind}"] == pytest.approx(capped.mean(), abs=1e-12)
        assert found[f"entropy/{kind}"] == pytest.approx(entropy.numpy()[keep].mean(), abs=1e-12)
    keep = step["mask"].bool()
    gap = (arrays["reference_logprobs"] - arrays["logprobs"])[keep]
    assert found["kl/reference"] == pytest.approx((np.exp(gap) - gap - 1).mean(), abs=1e-12)
    assert found["entropy"] == pytest.approx(entropy.numpy()[keep].mean(), abs=1e-12)
    assert found["loss/policy"] == pytest.approx(output.policy.item())
    assert found["loss/kl"] == pytest.approx(output.kl.item())


def test_merging_parts_changes_nothing() -> None:
    whole, parts = collect([[0, 1, 2, 3, 4]]), collect([[3, 0], [1], [4, 2]])
    assert parts.metrics() == pytest.approx(whole.metrics(), abs=1e-12)
    assert set(parts.metrics()) == set(whole.metrics())
    for kind in ("fresh", "replay"):
        left, right = (
            loss_by_position([step_metrics.distributions()], kind)
            for step_metrics in (parts, whole)
        )
        assert left is not None and right is not None
        np.testing.assert_allclose(left, right, atol=1e-12)


def test_behaviour_kl_is_each_prompts_own_and_capped() -> None:
    step, _ = make()
    arrays = {name: tensor.numpy() for name, tensor in step.items()}
    gap = arrays["behaviour_logprobs"] - arrays["logprobs"]
    k3 = np.minimum(np.exp(gap) - gap - 1, 1.0) * arrays["mask"]
    for splits in ([[0, 1, 2, 3, 4]], [[3, 0], [1], [4, 2]]):
        found = collect(splits).behaviour_kl()
        assert [(one.prompt_id, one.tokens, one.fresh) for one in found] == [
            ("a", 15, True),
            ("b", 4, True),
            ("c", 4, False),
        ]
        for one, rows in zip(found, ([0, 2], [1, 4], [3]), strict=True):
            assert one.k3 == pytest.approx(k3[rows].sum(), abs=1e-12)


def test_one_outlier_counts_at_most_one_nat_and_moves_no_other_prompt() -> None:
    behaviour = torch.full((2, 4), -1.0, dtype=torch.float64)
    logprobs = behaviour.clone()
    logprobs[0, 0] = -9.0  # k3 = e^8 - 9, about 2,972 nats
    mask, replay = torch.ones(2, 4), torch.zeros(2, dtype=torch.bool)
    config = ObjectiveConfig(beta=0)
    output = policy_loss(
        logprobs,
        behaviour,
        mask,
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, 4, dtype=torch.float64),
        replay,
        None,
        config,
        totals=StepTotals.count(mask.sum(1), replay, config),
    )
    step_metrics = StepMetrics()
    step_metrics.add(output, prompt_ids=["outlier", "calm"])
    calm, outlier = step_metrics.behaviour_kl()
    assert (calm.prompt_id, calm.k3, calm.tokens) == ("calm", 0.0, 4)
    assert (outlier.k3, outlier.tokens) == (1.0, 4)


def test_loss_profile_shows_the_parabola() -> None:
    """Ratio 1, advantage +-1, 41 tokens: the absolute loss of a bin is the mean TAS weight over its
    positions."""
    mask = torch.ones(2, 41, dtype=torch.float64)
    logprobs = torch.zeros(2, 41, dtype=torch.float64)
    config = ObjectiveConfig(beta=0)
    replay = torch.zeros(2, dtype=torch.bool)
    totals = StepTotals.count(mask.sum(1), replay, config)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    step_metrics = StepMetrics()
    weights = tas_weights(mask, dtype=torch.float64)
    step_metrics.add(
        policy_loss(
            logprobs, logprobs, mask, advantages, weights, replay, None, config, totals=totals
        )
    )
    profile = loss_by_position([step_metrics.distributions()] * 2, "fresh")  # two steps alike
    assert profile is not None
    position = np.arange(41) / 40
    weight = 1 + 0.3 * (2 * position - 1) ** 2
    for index in range(20):
        inside = np.minimum(np.floor(position * 20 + 1e-9), 19) == index
        assert profile[index] == pytest.approx(weight[inside].mean(), abs=1e-12)
    assert loss_by_position([step_metrics.distributions()], "replay") is None
    assert not {
        name
        for name in step_metrics.metrics()
        if "replay" in name or name.startswith(("entropy", "kl/ref"))
    }


def test_groups_advantages_and_ages() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    replay = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    rewards = rewards_tensor([1, 0, 1, 0, 0, 1, 0.5, None])
    baselines = torch.full((8,), 0.5, dtype=torch.float64)
    advantages = step_advantages(rewards, groups, replay, baselines)
    step_metrics = StepMetrics()
    step_metrics.add_step(advantages, replay, ages=torch.tensor([2, 5]))
    found = step_metrics.metrics()
    # Group 1 is all failures, group 2 has a single scored member; the replay of group 1 revives it.
    assert found["groups/dead_before"] == pytest.approx(2 / 3)
    assert found["groups/dead_after"] == pytest.approx(1 / 3)
    assert found["age/replay/mean"] == 3.5
    assert found["age/replay/max"] == 5
    fresh = np.array(step_metrics.distributions()["advantages/fresh"])
    assert fresh.sum() == 5  # the masked reward is not counted
    assert fresh[len(fresh) // 2] == 3  # two failures of group 1 and the lone member are exactly 0
    assert sum(step_metrics.distributions()["advantages/replay"]) == 2
    shares = advantage_shares([step_metrics.distributions()], "fresh")
    assert shares is not None and shares[len(shares) // 2] == pytest.approx(0.6)


def test_advantages_outside_the_edges_are_counted_in_the_last_bins() -> None:
    values = torch.tensor([-100.0, 100.0, 0.0])
    dead = torch.zeros(1, dtype=torch.bool)
    step_metrics = StepMetrics()
    step_metrics.add_step(
        Advantages(values, torch.ones(3, dtype=torch.bool), dead, dead), dead.expand(3)
    )
    counts = step_metrics.distributions()["advantages/fresh"]
    assert (counts[0], counts[-1], counts[len(counts) // 2]) == (1, 1, 1)
    assert len(counts) == len(ADVANTAGE_EDGES) - 1


def test_entropy_of_another_shape_is_a_typed_error() -> None:
    step, entropy = make()
    with pytest.raises(DataError, match=r"entropy has shape \(5, 8\)"):
        StepMetrics().add(loss_of(step, [0, 1, 2, 3, 4]), entropy[:, :8])


def test_one_outlier_spoils_the_mean_of_the_kl_but_not_the_capped_one() -> None:
    step, _ = make()
    quiet = collect([[0, 1, 2, 3, 4]]).metrics()
    step["behaviour_logprobs"] = step["behaviour_logprobs"].clone()
    step["behaviour_logprobs"][2, 0] += 12  # an old replay that the policy has left far behind
    step_metrics = StepMetrics()
    step_metrics.add(loss_of(step, [0, 1, 2, 3, 4]))
    found = step_metrics.metrics()
    assert found["kl/behaviour"] > 1000 > quiet["kl/behaviour"] * 1000
    assert (
        found["kl/behaviour_capped"]
        < quiet["kl/behaviour_capped"] + 1 / float(LENGTHS.sum()) + 1e-9
    )


def test_what_was_left_out_is_counted_over_ranks() -> None:
    first, second = StepMetrics(), StepMetrics()
    first.skip(["a.0"])
    second.skip(["b.1", "b.2"], count=0)
    first.merge(pickle.loads(pickle.dumps(second)))
    assert (first.skipped, first.culprits) == (1, ["a.0", "b.1", "b.2"])


def test_only_tokens_of_the_trained_version_are_compared_and_ranks_merge() -> None:
    def trajectory(*versions: tuple[int, int]) -> Any:
        tokens = sum(count for _, count in versions)
        return SimpleNamespace(versions=versions, logprobs=np.full(tokens, -1.0, np.float32))

    first, second = StepMetrics(), StepMetrics()
    assert "mismatch/on_policy" not in first.metrics()
    # Two tokens of version 4, then three of 5, which are 0.5 off; the others are further off.
    ours = np.array([-9.0, -9.0, -1.5, -0.5, -1.5], np.float32)
    first.add_on_policy([trajectory((4, 2), (5, 3))], [ours], 5)
    second.add_on_policy([trajectory((5, 1))], [np.array([-1.0], np.float32)], 5)
    first.merge(second)
    found = first.metrics()
    assert found["mismatch/on_policy_tokens"] == 4
    assert found["mismatch/on_policy"] == pytest.approx(1.5 / 4)
