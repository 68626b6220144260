"""The map between a model and its published checkpoint: what is loaded comes out as it was, bit for
bit, in every family; unknown layouts are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from avatar_rl.buffer_service.weights.receiver import WeightContract
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.model import names
from avatar_rl.learner.model.export import export_checkpoint
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.names import NameMap
from tests.integration.test_model_check import SIZES, family, saved
from tests.tiny_families import FAMILIES, swap_experts
from tests.tiny_models import respawn

WEIGHTS = "model.safetensors"


def old_vision_language(out: Path) -> Path:
    """Qwen2.5-VL with the names of before transformers 4.52."""
    FAMILIES["qwen2_5_vl"](out)
    weights = load_file(out / WEIGHTS)
    assert all(name.startswith(("visual.", "model.", "lm_head.")) for name in weights)
    return out


def new_vision_language(out: Path) -> Path:
    """The same with the names of its module, as some write it."""
    FAMILIES["qwen2_5_vl"](out)
    change(
        out,
        lambda weights: {
            name.replace("model.", "model.language_model.", 1)
            if name.startswith("model.")
            else name.replace("visual.", "model.visual.", 1): tensor
            for name, tensor in weights.items()
        },
    )
    return out


def talking_omni(out: Path) -> Path:
    """With the parts that no text comes from, in shards with an index."""
    FAMILIES["qwen3_omni_moe"](out)
    weights = load_file(out / WEIGHTS)
    weights |= {"talker.w": torch.full((2,), 7.0), "code2wav.w": torch.ones(1).bfloat16()}
    (out / WEIGHTS).unlink()
    index = {}
    for number, chosen in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in chosen}, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return out


def text(name: str, **settings: Any) -> Callable[[Path], Path]:
    return lambda out: saved(family(name, **SIZES, **settings), out)


def bfloat16(out: Path) -> Path:
    FAMILIES["qwen3_omni_moe"](out)
    change(out, lambda weights: {name: t.bfloat16() for name, t in weights.items()})
    return out


LAYOUTS: dict[str, Callable[[Path], Path]] = FAMILIES | {
    "qwen2_5_vl, old names": old_vision_language,
    "qwen2_5_vl, new names": new_vision_language,
    "qwen3_omni_moe, whole": talking_omni,
    "qwen3_omni_moe, bfloat16": bfloat16,
    "mixtral": text("Mixtral", num_local_experts=11),
    "qwen3_moe": text(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16
    ),
    "gpt2-like names": text("Mistral"),
}


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    save_file(how(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part_bytes", [1, 1 << 40])
def test_what_is_loaded_comes_out_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, part_bytes: int
) -> None:
    monkeypatch.setattr(names, "PART_BYTES", part_bytes)
    base = LAYOUTS[layout](tmp_path / "base")
    before = tensors(base)
    dtype = "bfloat16" if "bfloat16" in layout else "float32"
    model = load_model(base, dtype=dtype)
    found = NameMap.of(model, base)
    state = model.state_dict()
    assert len(found.parts) == 1 if part_bytes > 1 else len(found.parts) > 2
    parts = found.publish({name: state[name] for name in part} for part in found.parts)
    published = {name: tensor for part in parts for name, tensor in part.items()}
    WeightContract(base).check(published.items())
    assert list(published) == list(found.layout)
    assert all(
        found.layout[name].shape == tensor.shape and found.layout[name].dtype == tensor.dtype
        for name, tensor in published.items()
    )
    after = tensors(export_checkpoint(published, base, tmp_path / "out"))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("layout", ["qwen3_omni_moe", "qwen3_vl_moe", "mixtral", "tied"])
@torch.no_grad()
def test_trained_weights_are_the_policy_for_whoever_loads_the_export(
    tmp_path: Path, layout: str
) -> None:
    base = LAYOUTS[layout](tmp_path / "base")
    model = load_model(base)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    state = model.state_dict()
    found = NameMap.of(model, base)
    parts = found.publish({name: state[name] for name in part} for part in found.parts)
    loaded = load_model(export_checkpoint(parts, base, tmp_path / "out"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def renamed_experts(folder: Path) -> None:
    change(folder, lambda w: {n.replace("gate_proj", "w1"): t for n, t in w.items()})


def lone_expert(folder: Path) -> None:
    change(folder, lambda w: {n: t for n, t in w.items() if ".experts.11.down_proj" not in n})


def fused_by_save(folder: Path) -> None:
    swap_experts(folder)


def square(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = config["text_config"]["hidden_size"]
    shutil.rmtree(folder)
    hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(**config)).save_pretrained(folder)
    swap_experts(folder)


def untied(folder: Path) -> None:
    change(folder, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1})


def stranger(folder: Path) -> None:
    change(folder, lambda w: w | {"model.layers.0.extra.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("layout", "how", "message"),
    [
        (
            "qwen3_omni_moe",
            renamed_experts,
            r"experts lie in an unknown layout .known: .*gate_proj",
        ),
        (
            "qwen3_omni_moe",
            lone_expert,
            r"down_proj.*do(es)? not .*experts lie in an unknown layout",
        ),
        ("qwen3_vl_moe", fused_by_save, r"unknown layout, as save_pretrained writes them"),
        ("qwen3_vl_moe", square, r"unknown layout: they are square"),
        ("tied", untied, r"ties the head to the embeddings.*holds another head"),
        ("tied", stranger, r"'model\.layers\.0\.extra\.weight'\) are no parameters"),
    ],
)
def test_other_layouts_are_refused_by_name(
    tmp_path: Path, layout: str, how: Callable[[Path], None], message: str
) -> None:
    base = LAYOUTS[layout](tmp_path / "base")
    how(base)
    with pytest.raises(ModelError, match=message) as caught:
        NameMap.of(load_model(base), base)
    assert str(base) in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    base = FAMILIES["tied"](tmp_path / "base")
    model = load_model(base)
    other = LAYOUTS["mixtral"](tmp_path / "other")
    with pytest.raises(ModelError, match=r"has no counterpart|do not make"):
        NameMap.of(model, other)


def test_respawned_families_differ_from_their_base(tmp_path: Path) -> None:
    """The parity tests stand on it: weights in the published layout, drawn anew."""
    base = FAMILIES["qwen3_vl_moe"](tmp_path / "base")
    weights = respawn(base, tmp_path / "model", seed=1)
    assert weights.keys() == load_file(base / WEIGHTS).keys()
    NameMap.of(load_model(tmp_path / "model"), tmp_path / "model")
