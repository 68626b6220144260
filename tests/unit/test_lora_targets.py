"""Which layers get an adapter, by words and names, and what is said where none does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    checkpoint_folder,
    cold_start_folder,
    prepare_base_model,
)
from avatar_rl.common.errors import ConfigError, ModelError
from avatar_rl.common.weight_files import fingerprint
from avatar_rl.learner.adapter.base import BaseRecord
from avatar_rl.learner.adapter.files import AdapterFolder, check_targets, is_adapter
from avatar_rl.learner.adapter.targets import choose, encoder_layers, part_of
from avatar_rl.learner.lora_config import LoraConfig

#: Layers as transformers and published checkpoints name them.
LAYERS = {
    "thinker.model.layers.0.self_attn.q_proj": "llm",
    "thinker.model.layers.0.mlp.down_proj": "llm",
    "model.language_model.layers.3.mlp.gate_proj": "llm",
    "model.layers.0.mlp.shared_expert.up_proj": "llm",
    "thinker.model.layers.0.mlp.experts.7.up_proj": None,
    "thinker.model.layers.0.mlp.gate": None,
    "thinker.visual.blocks.0.attn.qkv": "vision",
    "model.visual.blocks.1.mlp.linear_fc1": "vision",
    "thinker.visual.merger.mlp.0": "projector",
    "model.visual.deepstack_merger_list.0.linear_fc1": "projector",
    "visual.merger_list.0.mlp.2": "projector",
    "thinker.audio_tower.layers.0.self_attn.q_proj": "audio",
    "audio_tower.layers.0.self_attn.out_proj": "audio",
    "thinker.audio_tower.proj": "projector",
    "lm_head": None,
    "model.embed_tokens": None,
    "thinker.audio_tower.embed_positions": None,
    "model.visual.pos_embed": None,
    "talker.model.layers.0.self_attn.q_proj": None,
    "token2wav.code2wav_dit_model.proj": None,
}
SHAPES = {name: (64, 32) for name in LAYERS}


def test_every_layer_has_its_part() -> None:
    assert {name: part_of(name) for name in LAYERS} == LAYERS


@pytest.mark.parametrize("part", ["llm", "projector", "vision", "audio"])
def test_a_word_takes_its_part(part: str) -> None:
    chosen = choose(SHAPES, LoraConfig(targets=(part,)))
    assert chosen == [name for name, found in LAYERS.items() if found == part]


def test_all_linear_is_all_parts_and_a_name_is_that_layer_everywhere() -> None:
    everything = [name for name, part in LAYERS.items() if part is not None]
    assert choose(SHAPES, LoraConfig(targets=("all-linear",))) == everything
    four = LoraConfig(targets=("vision", "audio", "projector", "llm"))
    assert choose(SHAPES, four) == everything
    assert choose(SHAPES, LoraConfig(targets=("q_proj",))) == [
        "thinker.model.layers.0.self_attn.q_proj",
        "thinker.audio_tower.layers.0.self_attn.q_proj",
    ]
    both = choose(SHAPES, LoraConfig(targets=("llm", "audio_tower.proj")))
    assert "thinker.audio_tower.proj" in both and len(both) == 5
    assert encoder_layers(both) == ["thinker.audio_tower.proj"]


@pytest.mark.parametrize("target", ["vision", "proj", "x", "layers.0", "roj", "embed_positions"])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(target: str) -> None:
    text = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.down_proj": (8, 8)}
    with pytest.raises(ConfigError) as refusal:
        choose(text, LoraConfig(rank=2, targets=("q_proj", target)), key="cold_start.lora")
    said = str(refusal.value)
    assert f"cold_start.lora.targets: {target!r} matches no linear layer" in said
    assert "the parts llm (2) and layers named down_proj, q_proj" in said


def test_a_rank_above_a_chosen_layers_width_is_refused() -> None:
    shapes = {**SHAPES, "thinker.visual.blocks.0.attn.qkv": (96, 12)}
    assert choose(shapes, LoraConfig(rank=32, targets=("llm",)))
    with pytest.raises(ConfigError, match=r"rank 16 is above .*attn\.qkv with 12: lower .* to 12"):
        choose(shapes, LoraConfig(rank=16, targets=("llm", "vision")))


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"targets": []},
        {"targets": [""]},
        {"targets": ["llm", "lm_head"]},
        {"targets": ["model.embed_tokens"]},
        {"r": 8},
    ],
)
def test_settings_that_make_no_adapter_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoraConfig.model_validate(settings)


def test_the_scale_is_pefts() -> None:
    assert LoraConfig(rank=8, alpha=32).scaling == 4
    assert LoraConfig(rank=16, alpha=32, rslora=True).scaling == 8
    assert LoraConfig(targets=("llm", "q_proj")).encoder_targets == ()
    assert LoraConfig(targets=("all-linear",)).encoder_targets == ("all-linear",)


def checkpoint(folder: Path, value: float = 1.0, **shapes: tuple[int, ...]) -> Path:
    folder.mkdir(parents=True)
    layers = {name.replace("_of_", "."): shape for name, shape in shapes.items()}
    layers |= {"model.layers.0.mlp.up_proj.weight": (8, 4), "lm_head.weight": (9, 4)}
    save_file(
        {n: np.full(shape, value, np.float32) for n, shape in layers.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def adapter(folder: Path, base: Path | None, **settings: object) -> Path:
    folder.mkdir(parents=True)
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(usual | settings))
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{prefix}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{prefix}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_targets_are_checked_by_a_checkpoints_headers(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    check_targets(folder, LoraConfig(rank=4), "learner.lora")
    check_targets(folder, LoraConfig(rank=4, targets=("up_proj", "model.other.name")), "x")
    for lora in (LoraConfig(rank=5), LoraConfig(targets=("audio",)), LoraConfig(targets=("head",))):
        with pytest.raises(ConfigError, match=r"learner\.lora\.(rank|targets)"):
            check_targets(folder, lora, "learner.lora")


def test_fingerprints_tell_weights_apart_and_not_places(tmp_path: Path) -> None:
    one, copy = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    other = checkpoint(tmp_path / "c", value=2.0)
    wider = checkpoint(tmp_path / "d", x_of_weight=(2, 2))
    assert fingerprint(one) == fingerprint(copy)
    assert len({fingerprint(folder) for folder in (one, other, wider)}) == 3


def recipe(path: Path, tmp_path: Path, **model: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(path), **model},
            "data": {"train": "train.jsonl"},
            "output": {"cache": str(tmp_path / "cache")},
        }
    )


def test_a_base_with_an_adapter_becomes_one_checkpoint(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base)
    assert is_adapter(folder) and not is_adapter(base)
    told: list[str] = []
    for config in (recipe(folder, tmp_path), recipe(folder, tmp_path, base=str(base))):
        merged = prepare_base_model(config, lambda phase, _: told.append(phase))
        assert checkpoint_folder(config) == base.resolve()
    assert told == ["merging the adapter"]  # once: found by content
    from safetensors.numpy import load_file

    weights = load_file(merged / "model.safetensors")
    assert np.array_equal(weights["model.layers.0.mlp.up_proj.weight"], np.full((8, 4), 5.0))
    assert np.array_equal(weights["lm_head.weight"], np.ones((9, 4)))
    assert not (merged / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "of peft_type IA3: only LORA"),
        ({"use_dora": True}, "has use_dora: True"),
        ({"bias": "all"}, "has bias: all"),
        ({"base_model_name_or_path": "Qwen/Qwen2.5-Omni-7B"}, r"set model\.base to the checkpoint"),
        ({"base_model_name_or_path": None}, r"set model\.base to the checkpoint"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(
    tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    folder = adapter(tmp_path / "adapter", tmp_path, **settings)
    with pytest.raises((ConfigError, ModelError), match=said):
        prepare_base_model(recipe(folder, tmp_path), lambda *_: None)


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path) -> None:
    base, other = checkpoint(tmp_path / "base"), checkpoint(tmp_path / "other", value=3.0)
    folder = adapter(tmp_path / "adapter", base)
    (folder / "avatar_base.json").write_bytes(BaseRecord.of(base, LoraConfig()).content())
    assert AdapterFolder.open(folder).base(None) == base.resolve()
    with pytest.raises(ModelError, match=f"another base: it was trained on {base}.*{other} has"):
        prepare_base_model(recipe(folder, tmp_path, base=str(other)), lambda *_: None)


def test_a_base_without_an_adapter_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"model\.base .* is for an adapter"):
        prepare_base_model(recipe(base, tmp_path, base=str(base)), lambda *_: None)


def test_a_cold_start_without_lora_keeps_its_place_in_the_cache(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    (tmp_path / "sft.jsonl").write_text("{}")

    def place(**sft: object) -> Path:
        raw = recipe(base, tmp_path).model_dump() | {"cold_start": {"steps": 3, **sft}}
        raw["data"]["sft"] = tmp_path / "sft.jsonl"
        return cold_start_folder(RunConfig.model_validate(raw), base, tmp_path / "sft.jsonl")

    assert place() == place(lora=None) == place(ranks=2)
    assert len({place(), place(lora={}), place(lora={"rank": 8})}) == 3
