"""The policy loss against loops written from docs/method.md 1.1 and 2.3, by hand, and under every
split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.learner.config import ObjectiveConfig
from avatar_rl.learner.objective.loss import LossOutput, StepTotals, policy_loss
from avatar_rl.learner.objective.shaping import tas_weights

LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo")
RATIOS = ("token", "sequence", "sequence_plain")
LONGEST = 16


def make(
    seed: int, lengths: list[int], replay: list[int], dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Random tensors of a step, by the names of ``policy_loss``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=dtype)

    behaviour = -noise(1.5).abs()
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).to(dtype)
    return {
        "logprobs": (behaviour + noise(0.5)).requires_grad_(),
        "behaviour_logprobs": behaviour,
        "mask": mask,
        "advantages": torch.randn(shape[0], generator=generator, dtype=dtype),
        "tas": tas_weights(mask, dtype=dtype),
        "is_replay": torch.tensor(replay, dtype=torch.bool),
        "reference_logprobs": behaviour + noise(0.5),
    }


def totals_of(step: dict[str, Any], config: ObjectiveConfig, **options: Any) -> StepTotals:
    return StepTotals.count(
        step["mask"].sum(1), step["is_replay"], config, max_completion_tokens=LONGEST, **options
    )


def run(
    step: dict[str, Any], config: ObjectiveConfig, totals: StepTotals | None = None, **extra: Any
) -> LossOutput:
    return policy_loss(
        **step,
        config=config,
        totals=totals or totals_of(step, config),
        **extra,  # type: ignore[arg-type]
    )


def config_of(**options: Any) -> ObjectiveConfig:
    if options.get("ratio") == "sequence_plain":
        options.setdefault("tas_lambda", 0.0)
    return ObjectiveConfig(**options)


def loops(step: dict[str, Any], config: ObjectiveConfig) -> tuple[float, float]:
    """(surrogate loss, KL loss) of a whole step in plain Python, token by token."""
    step = {name: tensor.detach() for name, tensor in step.items()}
    rows = range(len(step["mask"]))
    lengths = [int(step["mask"][i].sum()) for i in rows]
    replay = step["is_replay"].tolist()
    sums = {False: 0.0, True: 0.0}
    divided_kl = 0.0
    for i in rows:
        differences = [
            float(step["logprobs"][i, t] - step["behaviour_logprobs"][i, t])
            for t in range(lengths[i])
        ]
        terms, kls = [], []
        for t, difference in enumerate(differences):
            rho = math.exp(difference if config.ratio == "token" else sum(differences) / lengths[i])
            advantage = float(step["advantages"][i] * step["tas"][i, t])
            if config.loss_type == "cispo":
                terms.append(min(rho, 1 + config.upper) * advantage * float(step["logprobs"][i, t]))
            else:
                inside = min(max(rho, 1 - config.epsilon), 1 + config.upper)
                unclipped = rho if config.delta is None else min(rho, config.delta)
                terms.append(min(unclipped * advantage, inside * advantage))
            gap = float(step["reference_logprobs"][i, t] - step["logprobs"][i, t])
            kls.append(math.exp(gap) - gap - 1)
        divisor = {"grpo": lengths[i], "dr_grpo": LONGEST}.get(config.loss_type, 1)
        sums[replay[i]] += sum(terms) / divisor
        divided_kl += sum(kls) / divisor
    by_tokens = config.loss_type in ("dapo", "bnpo", "cispo")
    counts = {
        k: sum(lengths[i] if by_tokens else 1 for i in rows if replay[i] == k)
        for k in (False, True)
    }
    gain = sum(
        scale * sums[kind] / counts[kind]
        for kind, scale in ((False, 1.0), (True, config.alpha))
        if counts[kind]
    )
    return -gain, config.beta * divided_kl / sum(counts.values())


def test_two_tokens_by_hand() -> None:
    """One fresh and one replayed completion; ratios 1.5 (clipped at 1.2) and 0.5 (clipped at 0.8,
    wrong sign)."""
    behaviour = torch.tensor([[-1.0, -2.0], [-1.0, 99.0]], dtype=torch.float64)
    ratio = torch.tensor([[1.5, 1.0], [0.5, 1.0]], dtype=torch.float64)
    current = (behaviour + ratio.log()).requires_grad_()
    step = {
        "logprobs": current,
        "behaviour_logprobs": behaviour,
        "mask": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        "advantages": torch.tensor([2.0, 1.0], dtype=torch.float64),
        "tas": torch.tensor([[1.3, 1.3], [1.3, 0.0]], dtype=torch.float64),
        "is_replay": torch.tensor([False, True]),
        "reference_logprobs": current.detach() + math.log(2),
    }
    output = run(step, ObjectiveConfig(alpha=0.6, beta=0.1))
    fresh = (1.2 * 2.6 + 1.0 * 2.6) / 2
    replayed = min(0.5 * 1.3, 0.8 * 1.3)
    k3 = 2 - math.log(2) - 1
    assert output.policy.item() == pytest.approx(-(fresh + 0.6 * replayed), abs=1e-14)
    assert output.kl.item() == pytest.approx(0.1 * k3, abs=1e-14)
    assert output.loss.item() == pytest.approx(-(fresh + 0.6 * replayed) + 0.1 * k3, abs=1e-14)
    assert output.tokens.clipped.tolist() == [[True, False], [False, False]]
    gradient = torch.autograd.grad(output.loss, current)[0]
    # d k3 / d current = 1 - exp(reference - current) = -1; each sequence has weight 1/2 in the KL.
    kl = [-0.1 / 4, -0.1 / 4, -0.1 / 2]
    # At ratio 1 min() ties inside the clip range, and both branches pass the gradient.
    expected = [[0 + kl[0], -2.6 / 2 + kl[1]], [-0.6 * 0.5 * 1.3 + kl[2], 0]]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("replay", [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_equals_the_loops(loss_type: str, ratio: str, replay: list[int]) -> None:
    delta = None if loss_type == "cispo" else 1.6
    config = config_of(loss_type=loss_type, ratio=ratio, epsilon_high=0.28, delta=delta)
    step = make(1, [5, 1, 7, 3, 2], replay)
    output = run(step, config)
    policy, kl = loops(step, config)
    assert output.policy.item() == pytest.approx(policy, abs=1e-13)
    assert output.kl.item() == pytest.approx(kl, abs=1e-13)
    assert output.loss.item() == pytest.approx(policy + kl, abs=1e-13)
    assert output.rows.sum().item() == pytest.approx(policy + kl, abs=1e-13)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    "split", [[[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1], [4, 2]], [[3, 4], [0, 1, 2, 5]]]
)
def test_any_split_into_micro_batches_and_ranks_gives_the_same(
    loss_type: str, ratio: str, split: list[list[int]]
) -> None:
    config = config_of(loss_type=loss_type, ratio=ratio, mask_truncated_completions=True)
    step = make(2, [4, 9, 1, 6, 2, 3], [0, 1, 0, 1, 1, 0])
    truncated = torch.tensor([False, True, False, False, False, False])
    totals = totals_of(step, config, truncated=truncated)
    whole = run(step, config, totals, truncated=truncated)
    gradient = torch.autograd.grad(whole.loss, step["logprobs"])[0]
    loss, parts = 0.0, torch.zeros_like(gradient)
    counted = []
    for rows in split:
        width = int(step["mask"][rows].sum(1).max())  # each micro-batch pads to its own longest
        part = {k: v[rows][:, :width] if v.dim() == 2 else v[rows] for k, v in step.items()}
        counted.append(totals_of(part, config, truncated=truncated[rows]))
        output = run(part, config, totals, truncated=truncated[rows])
        loss += output.loss.item()
        parts += torch.autograd.grad(output.loss, step["logprobs"])[0]
    assert loss == pytest.approx(whole.loss.item(), abs=1e-12)
    assert (parts - gradient).abs().max() < 1e-12
    assert sum(counted[1:], counted[0]) == totals


def test_alpha_scales_the_replayed_surrogate_only() -> None:
    step = make(3, [4, 3, 5, 2], [0, 0, 1, 1])
    gradients, outputs = [], []
    for alpha in (0.0, 0.5, 1.0):
        outputs.append(run(step, ObjectiveConfig(alpha=alpha)))
        gradients.append(torch.autograd.grad(outputs[-1].loss, step["logprobs"])[0])
    assert torch.equal(gradients[0][:2], gradients[2][:2])
    assert torch.allclose(gradients[1], (gradients[0] + gradients[2]) / 2, atol=1e-15)
    assert outputs[0].kl == outputs[2].kl
    kl_only = run(step | {"advantages": torch.zeros(4, dtype=torch.float64)}, ObjectiveConfig())
    expected = torch.autograd.grad(kl_only.loss, step["logprobs"])[0]
    assert torch.allclose(gradients[0][2:], expected[2:], atol=1e-15)
    assert expected[2:].abs().max() > 1e-3


def test_tas_leaves_the_kl_alone() -> None:
    step = make(4, [6, 3], [0, 1])
    shaped, flat = (
        run(step, ObjectiveConfig()),
        run(step | {"tas": step["mask"]}, ObjectiveConfig()),
    )
    assert shaped.kl == flat.kl
    assert shaped.policy != flat.policy


def test_gspo_gradient_is_that_of_its_definition() -> None:
    """Autograd through J = mean_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean_t log-ratio),
    docs/method.md 2.3."""
    lengths = [5, 2, 7, 1]
    step = make(5, lengths, [0, 0, 0, 0]) | {"reference_logprobs": None}
    step["tas"] = step["mask"]
    terms = []
    for i, length in enumerate(lengths):
        s = (step["logprobs"] - step["behaviour_logprobs"])[i, :length].mean().exp()
        a = step["advantages"][i]
        terms.append(torch.min(s * a, s.clamp(1 - 0.05, 1 + 0.1) * a))
    expected = torch.autograd.grad(-torch.stack(terms).mean(), step["logprobs"])[0]
    assert expected.abs().max() > 0.01
    for ratio in ("sequence", "sequence_plain"):
        config = ObjectiveConfig(ratio=ratio, epsilon=0.05, epsilon_high=0.1, beta=0, tas_lambda=0)  # type: ignore[arg-type]
        found = torch.autograd.grad(run(step, config).loss, step["logprobs"])[0]
        assert (found - expected).abs().max() < 1e-15


def test_gspo_token_gives_each_token_its_own_weight() -> None:
    """Unclipped: d loss / d logprob_{i,t} = -s_i w_t A_i / (L_i n) in closed form."""
    lengths = [5, 3]
    step = make(6, lengths, [0, 0]) | {"reference_logprobs": None}
    found = torch.autograd.grad(
        run(step, ObjectiveConfig(ratio="sequence", epsilon=0.99, epsilon_high=50.0, beta=0)).loss,
        step["logprobs"],
    )[0]
    for i, length in enumerate(lengths):
        difference = (step["logprobs"] - step["behaviour_logprobs"]).detach()
        s = math.exp(float(difference[i, :length].sum()) / length)
        for t in range(length):
            weight = 1 + 0.3 * (2 * t / (length - 1) - 1) ** 2
            expected = -s * weight * float(step["advantages"][i]) / (length * 2)
            assert found[i, t].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("epsilon_high", "delta"), [(0.28, None), (0.28, 1.5), (None, 1.3)])
def test_clipped_tokens_are_those_without_gradient(
    epsilon_high: float | None, delta: float | None
) -> None:
    step = make(12, [9, 9, 9, 9, 9, 9], [0, 1, 0, 1, 0, 1])
    output = run(step, ObjectiveConfig(epsilon_high=epsilon_high, delta=delta, beta=0))
    gradient = torch.autograd.grad(output.loss, step["logprobs"])[0]
    assert torch.equal(output.tokens.clipped, gradient == 0)
    assert 0.1 < output.tokens.clipped.double().mean() < 0.9


def test_cispo_flags_capped_weights_and_keeps_their_gradient() -> None:
    step = make(13, [9, 9], [0, 0])
    output = run(step, ObjectiveConfig(loss_type="cispo", epsilon_high=0.3, beta=0))
    gradient = torch.autograd.grad(output.loss, step["logprobs"])[0]
    ratio = (step["logprobs"] - step["behaviour_logprobs"]).detach().exp()
    assert torch.equal(output.tokens.clipped, ratio > 1.3)
    assert output.tokens.clipped.any()
    expected = -ratio.clamp(max=1.3) * step["tas"] * step["advantages"][:, None] / 18
    assert torch.allclose(gradient, expected, atol=1e-15)


def test_old_logprobs_take_the_place_of_the_behaviour_in_the_ratio() -> None:
    step = make(7, [4, 6], [0, 1])
    old = step["logprobs"].detach() + 0.1
    step["is_replay"][1] = False
    plain = run(step, ObjectiveConfig(mismatch="none"), old_logprobs=old)
    assert plain.loss.item() == pytest.approx(
        run(step | {"behaviour_logprobs": old}, ObjectiveConfig()).loss.item()
    )
    # Decoupled: the sampler's share is a constant weight min(old / behaviour, 2).
    weighted = run(step, ObjectiveConfig(mismatch="token_truncate"), old_logprobs=old)
    expected = (old - step["behaviour_logprobs"]).exp().clamp(max=2.0)
    keep = step["mask"].bool()
    assert torch.allclose(weighted.tokens.weight[keep], expected[keep])
    assert torch.allclose(weighted.tokens.loss[keep], (plain.tokens.loss * expected)[keep])


def test_loss_keeps_the_dtype_of_the_model() -> None:
    step = make(14, [3, 6], [0, 1], torch.float32) | {
        "advantages": torch.ones(2, dtype=torch.float64)
    }
    assert run(step, ObjectiveConfig()).loss.dtype == torch.float32


def test_padding_may_hold_anything() -> None:
    step = make(8, [3, 6], [0, 1])
    clean = run(step, ObjectiveConfig())
    junk = dict(step)
    for name in ("logprobs", "behaviour_logprobs", "reference_logprobs", "tas"):
        junk[name] = torch.where(step["mask"].bool(), step[name], torch.nan)
    dirty = run(junk, ObjectiveConfig())
    assert dirty.loss.item() == clean.loss.item()
    gradient = torch.autograd.grad(dirty.loss, step["logprobs"])[0]
    assert torch.equal(gradient, torch.autograd.grad(clean.loss, step["logprobs"])[0])


def test_nan_of_the_model_names_its_row() -> None:
    step = make(9, [3, 4, 2], [0, 0, 1])
    broken = step["logprobs"].detach().clone()
    broken[1, 2] = torch.nan
    output = run(step | {"logprobs": broken}, ObjectiveConfig())
    assert output.loss.isnan()
    assert (~output.rows.isfinite()).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("name", ["old_logprobs", "reference_logprobs"])
def test_nan_of_the_reference_or_of_the_old_policy_names_its_row(
    name: str, loss_type: str, value: float
) -> None:
    """Whatever a model computes costs its micro-batch, not the run."""
    step = make(9, [3, 4, 2], [0, 0, 1])
    step["old_logprobs"] = step["logprobs"].detach()
    step[name] = step[name].clone()
    step[name][1, 2] = value
    step[name][0, 3] = torch.nan  # padding
    for mismatch in ("token_mask", "sequence_truncate"):
        output = run(step, config_of(loss_type=loss_type, mismatch=mismatch))
        assert output.loss.isnan()
        assert (~output.rows.isfinite()).nonzero().flatten().tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    loss_type=st.sampled_from(LOSSES),
    ratio=st.sampled_from(RATIOS),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_loss_and_gradient_are_finite_for_any_log_probabilities(
    data: st.DataObject, loss_type: str, ratio: str, lengths: list[int]
) -> None:
    """Float32, log-probabilities down to -200, where a bare exp() overflows."""
    replay = data.draw(st.lists(st.integers(0, 1), min_size=len(lengths), max_size=len(lengths)))
    step = make(0, lengths, replay, torch.float32)
    size = step["mask"].numel()
    values = st.lists(st.floats(-200, 0, width=32), min_size=size, max_size=size)
    for name in ("logprobs", "behaviour_logprobs", "reference_logprobs"):
        step[name] = torch.tensor(data.draw(values)).reshape(step["mask"].shape)
    step["logprobs"].requires_grad_()
    output = run(step, config_of(loss_type=loss_type, ratio=ratio))
    gradient = torch.autograd.grad(output.loss, step["logprobs"])[0]
    assert output.loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[step["mask"] == 0] == 0).all()
    assert output.kl >= -1e-6


def bad(**changes: Any) -> dict[str, Any]:
    return make(10, [3, 2], [0, 1]) | changes


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (bad(advantages=torch.tensor([1.0, torch.nan])), r"advantages of rows \[1\] is NaN"),
        (bad(mask=torch.tensor([[1, 1, 1], [0, 0, 0]])), r"completions \[1\] have no token"),
        (
            bad(behaviour_logprobs=torch.full((2, 3), -torch.inf)),
            r"behaviour of rows \[0, 1\] is NaN or infinite",
        ),
        (bad(reference_logprobs=torch.zeros(2, 4)), r"reference has shape \(2, 4\)"),
        (bad(tas=torch.ones(3)), "tas has shape"),
        (bad(advantages=torch.ones(3)), r"advantages has shape \(3,\)"),
        (bad(mask=torch.ones(2, 2)), "must both be"),
    ],
)
def test_bad_tensors_are_typed_errors(step: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        run(step, ObjectiveConfig(), StepTotals(1, 1, 3, 2))


def test_missing_inputs_are_typed_errors() -> None:
    step = make(11, [3, 2], [0, 1])
    with pytest.raises(ConfigError, match=r"beta is 0\.1"):
        run(step | {"reference_logprobs": None}, ObjectiveConfig())
    with pytest.raises(ConfigError, match="old_logprobs"):
        run(step, ObjectiveConfig(old_logprobs="trainer"))
    with pytest.raises(ConfigError, match="rejection"):
        run(step, ObjectiveConfig(rejection="k3"))
    with pytest.raises(ConfigError, match="pass truncated"):
        totals_of(step, ObjectiveConfig(mask_truncated_completions=True))
    with pytest.raises(ConfigError, match="max_completion_tokens"):
        run(step, ObjectiveConfig(loss_type="dr_grpo"), StepTotals(1, 1, 3, 2))
    with pytest.raises(DataError, match="does not fit a step of 1 and 0"):
        run(step, ObjectiveConfig(), StepTotals(1, 0, 3, 0))
    with pytest.raises(ConfigError, match="max_completion_tokens"):
        _ = StepTotals(1, 1, 3, 2, 8) + StepTotals(1, 1, 3, 2, 9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": "sequence_plain"}, "tas_lambda: 0"),
        ({"delta": 1.1}, "must exceed"),
        ({"delta": 2.0, "loss_type": "cispo"}, "dual clip"),
        ({"mismatch_floor": 3.0}, "exceeds mismatch_cap"),
        ({"rejection": "k3", "old_logprobs": "behaviour"}, "auto or trainer"),
        ({"rejection": "geometric", "rejection_threshold": 0.9}, "must exceed 1"),
        ({"epsilon": 0.0}, "greater than 0"),
        ({"loss_type": "ppo"}, "grpo"),
        ({"clip": 0.2}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ObjectiveConfig(**options)
