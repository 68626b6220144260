"""The memory plan against bytes that a tiny model really takes, on a CPU."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoderConfig,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from avatar_rl.cluster.recipe.architecture import (
    ARCHITECTURES,
    Architecture,
    Tower,
    architecture_of,
    audio_tower,
    vision_tower,
)
from avatar_rl.cluster.recipe.memory import (
    FLOAT32,
    LOGIT_TILE,
    LearnerSetting,
    activation_bytes,
    learner_parts,
    tower_activations,
)
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.model.head import TILE
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.tiny_models import build_vision_language

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


# -- towers ----------------------------------------------------------------------------------------

PATCHES = 24  # a side of the picture
WIDTHS = {"depth": 3, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Architecture]:
    """A Qwen2.5-VL whose tower is large enough to tell its layers from what is beside them."""
    folder = tmp_path_factory.mktemp("seeing") / "model"
    config = hf.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision_config={**WIDTHS, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [2]},
    )
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    found = architecture_of(str(folder))
    assert found is not None
    return model, found


def kept_bytes(model: Any, forward: Any) -> int:
    """As ``saved_bytes``, of any forward."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def picture(model: Any, dtype: torch.dtype) -> Any:
    pixels = torch.randn(PATCHES * PATCHES, 1176, dtype=dtype)
    grid = torch.tensor([[1, PATCHES, PATCHES]])
    return lambda: model.get_image_features(pixels, grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_of_a_trained_tower_are_what_autograd_keeps(
    seeing: tuple[Any, Architecture], dtype: torch.dtype
) -> None:
    model, architecture = seeing[0].to(dtype), seeing[1]
    setting = LearnerSetting(
        pack_tokens=PATCHES * PATCHES // 4, number=dtype.itemsize, frozen=(), reference=False
    )
    kept, again = tower_activations(architecture, setting)
    measured = kept_bytes(model, picture(model, dtype))
    assert again == 0
    assert measured == pytest.approx(kept, rel=0.25)


def test_a_checkpointed_tower_keeps_the_inputs_of_its_layers(
    seeing: tuple[Any, Architecture],
) -> None:
    model, architecture = copy.deepcopy(seeing[0]).float(), seeing[1]
    recompute_activations(model)
    setting = LearnerSetting(
        pack_tokens=PATCHES * PATCHES // 4,
        number=FLOAT32,
        frozen=(),
        reference=False,
        checkpointing=True,
    )
    kept, again = tower_activations(architecture, setting)
    measured = kept_bytes(model, picture(model, torch.float32))
    # The merger's norm and activation besides, no small part beside three layers.
    assert kept <= measured <= 2 * kept
    assert again > 2 * PATCHES**2 * WIDTHS["hidden_size"] * FLOAT32


def test_an_adapter_on_a_tower_keeps_its_activations_and_one_on_the_projector_none(
    seeing: tuple[Any, Architecture],
) -> None:
    architecture = seeing[1]
    tokens = PATCHES**2 // 4
    merger = tokens * 2 * 4 * WIDTHS["hidden_size"] * FLOAT32  # the inputs of its two layers
    whole, _ = tower_activations(
        architecture,
        LearnerSetting(pack_tokens=tokens, number=FLOAT32, frozen=(), reference=False),
    )
    for targets, expected in ((("llm", "vision"), whole), (("projector",), merger)):
        model = copy.deepcopy(seeing[0]).float()
        adapter = Adapter.attach(model, LoraConfig(rank=2, targets=targets))
        model.requires_grad_(False)
        for layer in adapter.layers.values():
            for side in (layer.lora_A, layer.lora_B):
                side.requires_grad_(True)
        setting = LearnerSetting(
            pack_tokens=tokens,
            number=FLOAT32,
            adapter_rank=2,
            targets=targets,
            reference=False,
        )
        kept, _ = tower_activations(architecture, setting)
        measured = kept_bytes(model, picture(model, torch.float32))
        assert 0.4 * kept <= measured <= 2 * kept  # frozen weights keep less
        assert kept == expected


def test_sound_keeps_what_is_planned() -> None:
    config = Qwen2_5OmniAudioEncoderConfig(
        d_model=128,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=384,
        output_dim=HIDDEN,
        num_mel_bins=16,
        n_window=50,
    )
    torch.manual_seed(0)
    model = Qwen2_5OmniAudioEncoder(config).eval()
    tower = audio_tower(3, 128, 384, HIDDEN, mels=16)
    frames = 800
    architecture = replace(ARCHITECTURES[0], towers=(tower,))
    setting = LearnerSetting(pack_tokens=frames // 4, number=FLOAT32, frozen=(), reference=False)
    kept, _ = tower_activations(architecture, setting)
    lengths = torch.tensor([frames])

    def forward() -> None:
        sound = torch.randn(16, frames)
        model(sound, feature_lens=lengths, aftercnn_lens=(lengths - 1) // 2 + 1)

    assert kept_bytes(model, forward) == pytest.approx(kept, rel=0.4)  # convolutions besides


#: What an adapter may lie on, with a layer's name that towers and decoder share.
TARGETS = [("llm",), ("vision",), ("projector",), ("vision", "projector", "llm"), ("all-linear",)]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "omni"])
def test_adapters_have_the_parameters_that_peft_makes(tmp_path: Path, kind: str) -> None:
    if kind == "omni":
        build_tiny_omni(tmp_path)
    else:
        build_vision_language(tmp_path, kind)
    architecture = architecture_of(str(tmp_path))
    assert architecture is not None
    more = [("audio",), ("audio", "q_proj")] if kind == "omni" else [("qkv", "q_proj")]
    counts = {}
    for targets in [*TARGETS, *more]:
        model = load_model(tmp_path)
        Adapter.attach(model, LoraConfig(rank=2, targets=targets))
        made = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        assert architecture.adapter(2, targets) == made > 0, targets
        counts[targets] = made
    assert len(set(counts.values())) > 4  # towers count
    config = json.loads((tmp_path / "config.json").read_text())
    config = config.get("thinker_config", config)
    planned = replace(architecture, towers=published(config, kind))
    for targets in [*TARGETS, *more]:
        assert planned.adapter(2, targets) == counts[targets], targets
    found = sum(p.numel() for n, p in model.named_parameters() if is_tower(n) and ".lora_" not in n)
    assert architecture.encoders == found
    assert planned.encoders == pytest.approx(found, rel=0.05)  # biases and norms are left out


def is_tower(name: str) -> bool:
    return not {"visual", "audio_tower"}.isdisjoint(name.split("."))


def published(config: dict[str, Any], kind: str) -> tuple[Tower, ...]:
    """A model's towers as the published ones of its kind are counted."""
    vision = config["vision_config"]
    deep = [
        f"deepstack_merger_list.{i}" for i in range(len(vision.get("deepstack_visual_indexes", ())))
    ]
    is_third = kind == "qwen3_vl"
    side = vision["patch_size"] ** 2 * vision["temporal_patch_size"] * 3
    hidden = vision["hidden_size"]
    sight = vision_tower(
        vision["depth"],
        hidden,
        vision["intermediate_size"],
        vision["out_hidden_size"],
        patch=side,
        split=kind == "omni",
        gated=not is_third,
        mergers=[f"{name}.linear_fc{i}" for name in ("merger", *deep) for i in (1, 2)]
        if is_third
        else ("merger.mlp.0", "merger.mlp.2"),
        tables=vision["num_position_embeddings"] * hidden if is_third else 0,
    )
    if kind != "omni":
        return (sight,)
    audio = config["audio_config"]
    return sight, audio_tower(
        audio["encoder_layers"],
        audio["d_model"],
        audio["encoder_ffn_dim"],
        audio["output_dim"],
        mels=audio["num_mel_bins"],
    )
