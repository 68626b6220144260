"""Routers of mixtures of experts: frozen, trained, balanced."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from avatar_rl.common.errors import ConfigError
from avatar_rl.learner.model.router import Routers
from tests.integration.test_model_check import SIZES

IDS = torch.arange(5, 45)[None]


def mixtral(layers: int = 1) -> hf.MixtralForCausalLM:
    torch.manual_seed(0)
    settings = SIZES | {"num_hidden_layers": layers, "num_local_experts": 6}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_only_frozen_routers_keep_their_weights(mode: str) -> None:
    model = mixtral()
    routers = Routers(model, mode, 1.0)  # type: ignore[arg-type]
    (model(IDS).logits.sum() + routers.loss()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert ("model.layers.0.mlp.gate.weight" in moved) == (mode == "trained")
    assert "model.layers.0.mlp.experts.down_proj" in moved


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balancing_loss_is_that_of_transformers(checkpointing: bool) -> None:
    model, plain = mixtral(), mixtral()
    routers = Routers(model, "balanced", 0.01)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = plain(IDS, output_router_logits=True).router_logits
    expected = 0.01 * load_balancing_loss_func(logits, 6, 2)
    expected.backward()
    for _ in range(2):  # the second finds nothing left of the first, nor of its backward
        model.zero_grad()
        model(IDS, use_cache=False)
        found = routers.loss()
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, expected)
        found.backward()
        gate = model.model.layers[0].mlp.gate.weight.grad
        torch.testing.assert_close(gate, plain.model.layers[0].mlp.gate.weight.grad)
    assert routers.loss() == 0.0


def test_balance_is_a_mean_over_layers_and_least_where_experts_are_taken_alike() -> None:
    model = mixtral(layers=3)
    routers = Routers(model, "balanced", 1.0)
    model(IDS)
    skewed = float(routers.loss())
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    model(IDS)
    assert float(routers.loss()) == pytest.approx(2.0) and skewed > 2.05
    with torch.no_grad():
        model(IDS)
    assert routers.loss() == 0.0


def test_balance_without_experts_is_refused() -> None:
    dense = hf.MistralForCausalLM(hf.MistralConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"learner\.router is balanced.*no mixture"):
        Routers(dense, "balanced", 1.0)
    Routers(dense, "frozen", 1.0)
