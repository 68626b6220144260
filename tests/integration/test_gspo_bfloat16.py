"""GSPO in bfloat16 between two implementations of one model (docs/method.md 1.1, 2.3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from avatar_rl.learner.config import ObjectiveConfig
from avatar_rl.learner.objective.loss import StepTotals, policy_loss
from avatar_rl.learner.old_logprobs import OldLogprobs

ROWS, PROMPT, TOKENS, VOCABULARY = 16, 8, 64, 128


def model(dtype: torch.dtype, attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        attn_implementation=attention,
    )
    policy = transformers.Qwen2ForCausalLM(config).eval()
    policy.lm_head.weight.data.mul_(2.0)
    return policy.to(dtype)


def logprobs_of(policy: nn.Module, ids: Tensor) -> Tensor:
    logits = policy(input_ids=ids).logits[:, PROMPT - 1 : -1].float()
    return logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None])[..., 0]


def clip_shares(dtype: torch.dtype, rule: Any, lr: float) -> list[float]:
    """Clip share of both updates of one step, the sampler being another implementation."""
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, PROMPT + TOKENS))
    mask, names = torch.ones(ROWS, TOKENS), [str(row) for row in range(ROWS)]
    config = ObjectiveConfig(
        ratio="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0, tas_lambda=0, old_logprobs=rule
    )
    with torch.no_grad():
        behaviour = logprobs_of(model(dtype, "eager"), ids)
    policy, shares = model(dtype, "sdpa"), []
    masters = [parameter.detach().float().clone() for parameter in policy.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0)
    old = OldLogprobs(config.old_rule(str(dtype).removeprefix("torch.")), updates=2, ranks=1)
    for _ in range(2):
        current = logprobs_of(policy, ids)
        output = policy_loss(
            current,
            behaviour,
            mask,
            torch.tensor([1.0, -1.0] * (ROWS // 2)),
            mask,
            torch.zeros(ROWS, dtype=torch.bool),
            None,
            config,
            totals=StepTotals(ROWS, 0, ROWS * TOKENS, 0),
            old_logprobs=old.of(names, current, mask),
        )
        shares.append(output.tokens.clipped.float().mean().item())
        policy.zero_grad()
        output.loss.backward()
        old.share()
        for master, parameter in zip(masters, policy.parameters(), strict=True):
            master.grad = parameter.grad.float() if parameter.grad is not None else None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, policy.parameters(), strict=True):
                parameter.copy_(master)
    return shares


@pytest.mark.parametrize("lr", [3e-6, 1e-4])
def test_gspo_in_bfloat16_clips_nothing_on_policy(lr: float) -> None:
    """The ranges are those of the paper (docs/method.md 2.3), the updates such that move the policy
    by more than they allow."""
    half, full = (clip_shares(dtype, "auto", lr) for dtype in (torch.bfloat16, torch.float32))
    assert half[0] < 0.01
    assert half[1] <= full[1] + 0.01
    assert full[1] > 0.9  # the second update is one that clips
    assert clip_shares(torch.bfloat16, "behaviour", lr)[0] > 0.2  # what it was
