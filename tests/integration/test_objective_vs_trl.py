"""Loss and gradients against TRL's own GRPOTrainer code on identical float64 tensors.

Importing the trainer takes seconds and drags vLLM in, so its functions are lifted out of the
installed source and run as they stand: ``_compute_loss`` whole, and the two statements of the
scoring pass that compute advantages and mismatch weights."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from avatar_rl.learner.config import ObjectiveConfig
from avatar_rl.learner.objective.advantages import group_advantages
from avatar_rl.learner.objective.loss import StepTotals, policy_loss

SPEC = importlib.util.find_spec("trl")
if SPEC is None or SPEC.origin is None or not importlib.metadata.version("trl").startswith("1.16."):
    pytest.skip("needs trl 1.16 (extra `dev`)", allow_module_level=True)

TRAINER = Path(SPEC.origin).parent / "trainer"
ROWS, WIDTH, GROUP, LONGEST = 8, 9, 4, 12


def function(path: Path, name: str) -> ast.FunctionDef:
    return next(
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.FunctionDef) and n.name == name
    )


def load(node: ast.stmt, **names: Any) -> dict[str, Any]:
    """Execute one statement of TRL in a namespace of ours and return that."""
    space: dict[str, Any] = {"torch": torch, "math": math, **names}
    exec(compile(ast.Module(body=[node], type_ignores=[]), str(TRAINER), "exec"), space)
    return space


NANSTD = load(function(TRAINER / "utils.py", "nanstd"))["nanstd"]
TRL_LOSS: Callable[..., Tensor] = load(
    function(TRAINER / "grpo_trainer.py", "_compute_loss"), nanmin=torch.min, nanmax=torch.max
)["_compute_loss"]
SCORING = function(TRAINER / "grpo_trainer.py", "_generate_and_score_completions")


def statement(test: str, first: str) -> ast.If:
    """The ``if`` of TRL's scoring pass with this condition whose body starts by assigning
    ``first``."""
    found = [n for n in ast.walk(SCORING) if isinstance(n, ast.If) and ast.unparse(n.test) == test]
    return next(n for n in found if ast.unparse(n.body[0]).startswith(f"{first} ="))


ADVANTAGE_STATEMENT = statement(
    "self.multi_objective_aggregation == 'sum_then_normalize'", "rewards"
)
MISMATCH_STATEMENT = statement("self.use_vllm and self.vllm_importance_sampling_correction", "mask")


class Step:
    """One step of random tensors whose ratios fall on both sides of every clip."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        lengths = torch.randint(1, WIDTH + 1, (ROWS,))
        lengths[0] = WIDTH
        self.mask = (torch.arange(WIDTH) < lengths[:, None]).long()
        shape = (ROWS, WIDTH)
        self.old = -3 * torch.rand(shape, dtype=torch.float64)
        self.sampler = self.old + 0.3 * torch.randn(shape, dtype=torch.float64)
        self.reference = self.old + 0.5 * torch.randn(shape, dtype=torch.float64)
        self.current = (self.old + 0.6 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        self.advantages = torch.randn(ROWS, dtype=torch.float64)
        self.truncated = torch.arange(ROWS) % 3 == 0


def trl_loss(step: Step, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the log-probabilities by TRL's code."""
    corrected = config.old_logprobs == "trainer"
    mask = step.mask
    if config.mask_truncated_completions:
        mask = mask * (~step.truncated).unsqueeze(1).int()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            step.current,
            torch.zeros_like(step.current),
            None,
        ),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=False, delta=config.delta, steps_per_generation=1
        ),
        aux_loss_enabled=False,
        beta=config.beta,
        current_gradient_accumulation_steps=1,
        epsilon_low=config.epsilon,
        # TRL's cispo takes the cap itself, ours the range above 1 as everywhere else.
        epsilon_high=config.upper + (config.loss_type == "cispo"),
        importance_sampling_level="token" if config.ratio == "token" else "sequence",
        loss_type=config.loss_type,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        vllm_importance_sampling_mode=config.mismatch,
        vllm_importance_sampling_clip_max=config.mismatch_cap,
        vllm_importance_sampling_clip_min=config.mismatch_floor,
    )
    empty = torch.zeros(ROWS, 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": step.advantages,
        "old_per_token_logps": step.old,
        "ref_per_token_logps": step.reference,
        "num_items_in_batch": mask.sum().double(),  # an integer here is divided in float32
    }
    if corrected:
        inputs["importance_sampling_ratio"] = load(
            MISMATCH_STATEMENT,
            self=trainer,
            completion_mask=mask,
            tool_mask=None,
            old_per_token_logps=step.old,
            sampling_per_token_logps=step.sampler,
        )["vllm_importance_sampling_ratio"]
    loss = TRL_LOSS(trainer, trainer.model, inputs)
    return loss.detach(), torch.autograd.grad(loss, step.current)[0]


def our_loss(step: Step, config: ObjectiveConfig, pieces: int = 1) -> tuple[Tensor, Tensor]:
    """The same by ours, in ``pieces`` micro-batches."""
    fresh = torch.zeros(ROWS, dtype=torch.bool)
    totals = StepTotals.count(
        step.mask.sum(1), fresh, config, truncated=step.truncated, max_completion_tokens=LONGEST
    )
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(step.current)
    for rows in torch.arange(ROWS).chunk(pieces):
        output = policy_loss(
            step.current[rows],
            (step.sampler if config.old_logprobs == "trainer" else step.old)[rows],
            step.mask[rows],
            step.advantages[rows],
            torch.ones(len(rows), WIDTH, dtype=torch.float64),
            fresh[rows],
            step.reference[rows],
            config,
            totals=totals,
            old_logprobs=step.old[rows] if config.old_logprobs == "trainer" else None,
            truncated=step.truncated[rows],
        )
        loss += output.loss.detach()
        gradient += torch.autograd.grad(output.loss, step.current)[0]
    return loss, gradient


def assert_equal(config: ObjectiveConfig) -> None:
    for seed in range(3):
        step = Step(seed)
        loss, gradient = trl_loss(step, config)
        assert gradient.abs().max() > 1e-4, "the comparison needs a gradient to compare"
        for pieces in (1, 3):
            ours, our_gradient = our_loss(step, config, pieces)
            assert abs(ours - loss) < 1e-12
            assert (our_gradient - gradient).abs().max() < 1e-12


LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo")
RATIOS = ("token", "sequence", "sequence_plain")


@pytest.mark.parametrize(
    ("loss_type", "ratio", "beta"), itertools.product(LOSSES, RATIOS, (0.0, 0.1))
)
def test_losses_and_ratios(loss_type: str, ratio: str, beta: float) -> None:
    assert_equal(ObjectiveConfig(loss_type=loss_type, ratio=ratio, beta=beta, tas_lambda=0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("loss_type", "ratio"), itertools.product(LOSSES, RATIOS))
def test_clip_higher_dual_clip_and_truncation(loss_type: str, ratio: str) -> None:
    delta = None if loss_type == "cispo" else 1.5
    assert_equal(
        ObjectiveConfig(
            loss_type=loss_type,  # type: ignore[arg-type]
            ratio=ratio,  # type: ignore[arg-type]
            epsilon=0.1,
            epsilon_high=0.28,
            delta=delta,
            tas_lambda=0,
            mask_truncated_completions=True,
        )
    )


@pytest.mark.parametrize(
    ("mode", "floor", "ratio"),
    itertools.product(
        ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        (None, 0.5),
        ("token", "sequence_plain"),
    ),
)
def test_sampler_trainer_mismatch(mode: str, floor: float | None, ratio: str) -> None:
    for loss_type in LOSSES:
        assert_equal(
            ObjectiveConfig(
                loss_type=loss_type,  # type: ignore[arg-type]
                ratio=ratio,  # type: ignore[arg-type]
                old_logprobs="trainer",
                mismatch=mode,  # type: ignore[arg-type]
                mismatch_cap=1.2,
                mismatch_floor=floor,
                tas_lambda=0,
            )
        )


def test_gspo_clip_range_of_the_paper() -> None:
    """docs/method.md 2.3; one sequence is put inside the narrow range so that not every row is
    clipped."""
    config = ObjectiveConfig(
        ratio="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0, tas_lambda=0
    )
    step = Step(0)
    with torch.no_grad():
        step.current[:4] = step.old[:4] + 1e-4
    loss, gradient = trl_loss(step, config)
    ours, our_gradient = our_loss(step, config)
    assert abs(ours - loss) < 1e-12
    assert (our_gradient - gradient).abs().max() < 1e-12
    assert gradient[:4].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("scale", "masked"), itertools.product(("group", "batch", "none"), (False, True))
)
def test_scale_rewards(scale: str, masked: bool) -> None:
    torch.manual_seed(0)
    parts = torch.rand(16, 2, dtype=torch.float64)
    parts[4:8] = 0.3  # a dead group
    if masked:
        parts[1] = torch.nan
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    theirs = load(
        ADVANTAGE_STATEMENT,
        self=SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            scale_rewards=scale,
            reward_weights=weights,
        ),
        device=torch.device("cpu"),
        nanstd=NANSTD,
        num_generations=GROUP,
        rewards_per_func=parts,
        unscorable_mask=parts.isnan().all(1),
    )["advantages"].nan_to_num(0)
    ours = group_advantages((parts * weights).sum(1), torch.arange(16) // GROUP, scale)  # type: ignore[arg-type]
    assert (ours - theirs).abs().max() < 1e-7  # TRL takes n / (n - 1) in float32
    assert theirs.abs().max() > 0.1
