"""The memory plan against bytes that a tiny model really takes, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from avatar_rl.cluster.recipe.architecture import Architecture, architecture_of
from avatar_rl.cluster.recipe.memory import (
    FLOAT32,
    LOGIT_TILE,
    LearnerSetting,
    activation_bytes,
    learner_parts,
)
from avatar_rl.learner.model.head import TILE

TOKENS, LAYERS, HIDDEN, VOCABULARY = 256, 4, 128, 512


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Architecture]:
    folder = tmp_path_factory.mktemp("memory") / "model"
    config = hf.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = hf.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    found = architecture_of(str(folder))
    assert found is not None
    return model, found


def saved_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of all storages that autograd keeps for a forward of the decoder, weights left out."""
    model = model.to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address recurs
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=torch.arange(TOKENS)[None] % VOCABULARY, use_cache=False)
        assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_what_autograd_keeps(
    stage: tuple[Any, Architecture], dtype: torch.dtype
) -> None:
    model, architecture = stage
    measured = saved_bytes(model, dtype)
    planned = activation_bytes(architecture, TOKENS, number=dtype.itemsize)
    assert measured == pytest.approx(planned, rel=0.25)


def test_checkpointed_activations_are_the_layers_inputs(stage: tuple[Any, Architecture]) -> None:
    from avatar_rl.learner.model.load import recompute_activations

    model, architecture = stage
    recompute_activations(model)
    measured = saved_bytes(model, torch.float32)
    inputs = LAYERS * TOKENS * HIDDEN * FLOAT32
    assert inputs <= measured <= 2 * inputs  # the last norm, positions and the mask besides
    planned = activation_bytes(architecture, TOKENS, number=FLOAT32, checkpointing=True)
    one_layer = activation_bytes(architecture, TOKENS, number=FLOAT32) / LAYERS
    assert planned == inputs + one_layer


def test_weights_gradients_and_moments_of_a_step(stage: tuple[Any, Architecture]) -> None:
    model, architecture = stage
    model = model.float()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(16)[None]).logits.sum().backward()
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    state = (value for held in optimizer.state.values() for value in held.values())
    moments = sum(value.nbytes for value in state if value.dim() > 0)
    planned = learner_parts(architecture, LearnerSetting(number=FLOAT32, reference=False))
    # Biases and norms are left out.
    for name, found in (("weights", weights), ("gradients", gradients), ("optimiser", moments)):
        assert found == pytest.approx(planned[name], rel=0.02), (
            name
        )  # biases and norms are left out


def test_the_logits_tile_is_that_of_the_head(stage: tuple[Any, Architecture]) -> None:
    _, architecture = stage
    assert LOGIT_TILE == TILE
    planned = learner_parts(architecture, LearnerSetting(pack_tokens=10_000))
    of_weight = VOCABULARY * HIDDEN * FLOAT32  # the head's gradient, summed over tiles
    assert planned["logits"] == 2 * TILE * VOCABULARY * FLOAT32 + of_weight


def test_stored_embeddings_of_a_pack(tmp_path: Path, stage: tuple[Any, Architecture]) -> None:
    _, architecture = stage
    planned = learner_parts(architecture, LearnerSetting(pack_tokens=TOKENS, workers=1))
    embeddings = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    assert planned["embeddings"] == embeddings.nbytes
