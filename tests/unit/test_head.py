"""The tiled head against plain autograd over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import avatar_rl.learner.model.head as head
import avatar_rl.learner.model.head_on_cpu as head_on_cpu
from avatar_rl.learner.model.head import TiledHead, chunked_scores, tiles

VOCABULARY, WIDTH, TOKENS = 97, 12, 23


def plain(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """By torch.distributions, in float64."""
    logits = nn.functional.linear(
        states.double(), weight.double(), None if bias is None else bias.double()
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = torch.distributions.Categorical(logits=logits / temperature[:, None])
    return found.log_prob(tokens), found.entropy()


def made(dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    linear = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(random(*parameter.shape))
    states = random(TOKENS, WIDTH).to(dtype).requires_grad_()
    tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return linear.to(dtype), states, tokens, random(TOKENS).abs() + 0.5, random(TOKENS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [0, 10**6, 4 * 5 * VOCABULARY * 2])
def test_scores_and_gradients_equal_plain_autograd(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    softcap: float | None,
    bias: bool,
    kept: int,
) -> None:
    """Several tiles or blocks with a short last one; probabilities kept for none, all or some."""
    for name, value in {"TILE": 5, "KEPT": kept}.items():
        monkeypatch.setattr(head, name, value)
    for name, value in {"TOKENS": 5, "ROWS": 40}.items():
        monkeypatch.setattr(head_on_cpu, name, value)
    linear, states, tokens, temperature, weights = made(dtype, bias)
    logprobs, entropy = TiledHead(linear, softcap)(states, tokens, temperature)
    assert logprobs.dtype == entropy.dtype == torch.promote_types(dtype, torch.float32)
    assert not entropy.requires_grad
    (weights * logprobs).sum().backward()
    found = [states.grad, *(parameter.grad for parameter in linear.parameters())]
    states.grad = None
    linear.zero_grad()
    expected, expected_entropy = plain(
        states, linear.weight, linear.bias, tokens, temperature, softcap
    )
    # The logits of a bfloat16 model are not rounded: only its gradients are.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(logprobs.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=tolerance, rtol=tolerance)
    (weights * expected).sum().backward()
    loose = 1e-2 if dtype == torch.bfloat16 else 2e-5
    for gradient, parameter in zip(found, [states, *linear.parameters()], strict=True):
        assert gradient is not None and gradient.dtype == dtype
        torch.testing.assert_close(gradient, parameter.grad, atol=loose, rtol=loose)


def test_a_weight_of_many_tiles_sums_its_gradient_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "KEPT", 0)
    linear, states, tokens, temperature, _ = made(torch.bfloat16, bias=False)
    found = []
    for tile in (1, TOKENS):
        monkeypatch.setattr(head_on_cpu, "TOKENS", tile)
        linear.zero_grad()
        TiledHead(linear, None)(states, tokens, temperature)[0].sum().backward()
        assert linear.weight.grad is not None
        found.append(linear.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=2**-8)  # one rounding apart


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("rising", [False, True])
def test_likely_tokens_of_a_bfloat16_model_keep_their_small_gradients(
    monkeypatch: pytest.MonkeyPatch, kept: int, rising: bool
) -> None:
    """Logits of hundreds, the highest in the first block or the last: a token that has all but
    1e-4 of the probability would get no gradient, or a tenth too much, from a rounded one."""
    monkeypatch.setattr(head, "KEPT", kept)
    monkeypatch.setattr(head_on_cpu, "ROWS", 8)
    linear = nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:, 0] = torch.linspace(-300, 300, VOCABULARY) * (1 if rising else -1)
        best = int(linear.weight[:, 0].argmax())
        linear.weight[:, 1] = -1.0
        linear.weight[best, 1] = 1.0  # so that its gradients do not cancel
    linear.to(torch.bfloat16)
    states = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16)
    states[:, 0] = 1.0
    states.requires_grad_()
    tokens, temperature = torch.full((TOKENS,), best), torch.linspace(0.7, 2, TOKENS)
    logprobs, entropy = TiledHead(linear, None)(states, tokens, temperature)
    expected, expected_entropy = plain(states, linear.weight, None, tokens, temperature, None)
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=2e-5, rtol=2e-5)
    logprobs.sum().backward()
    found, states.grad = states.grad, None
    expected.sum().backward()
    assert found is not None and states.grad is not None and states.grad[:, 1].abs().min() > 0
    torch.testing.assert_close(found[:, 1], states.grad[:, 1], atol=0, rtol=2e-2)


def test_a_frozen_head_passes_the_gradient_on_and_gets_none() -> None:
    linear, states, tokens, temperature, _ = made(torch.float32, bias=True)
    TiledHead(linear, None)(states, tokens, temperature)[0].sum().backward()
    assert states.grad is not None
    expected, states.grad = states.grad, None
    linear.requires_grad_(False).zero_grad()
    TiledHead(linear, None)(states, tokens, temperature)[0].sum().backward()
    assert torch.equal(states.grad, expected)
    assert linear.weight.grad is None and linear.bias.grad is None
    with torch.no_grad():
        assert not TiledHead(linear, None)(states, tokens, temperature)[0].requires_grad


@pytest.mark.parametrize("chunks", [1, 4, 90])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_any_other_head_is_called_as_it_is(chunks: int, softcap: float | None) -> None:
    """90 chunks are more than there are tokens; twice as many runs, since chunks are recomputed."""
    linear, states, tokens, temperature, weights = made(torch.float32, bias=False)
    module = nn.Sequential(linear, nn.Identity())
    runs: list[int] = []
    module.register_forward_pre_hook(lambda _, given: runs.append(len(given[0])))
    logprobs, entropy = chunked_scores(module, softcap, states, tokens, temperature, chunks)
    (weights * logprobs).sum().backward()
    assert len(runs) == 2 * chunks and (0 in runs) == (chunks == 90)
    assert linear.weight.grad is not None
    found = linear.weight.grad.clone()
    linear.zero_grad()
    tiled, tiled_entropy = TiledHead(linear, softcap)(states, tokens, temperature)
    torch.testing.assert_close(logprobs, tiled, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, tiled_entropy, atol=1e-5, rtol=0)
    (weights * tiled).sum().backward()
    torch.testing.assert_close(found, linear.weight.grad, atol=2e-5, rtol=0)
    assert [tiles(n) for n in (0, 1, head.TILE, head.TILE + 1)] == [1, 1, 1, 2]
