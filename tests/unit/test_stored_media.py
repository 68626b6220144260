"""Whether rollouts may take stored embeddings, how media are named alike on both sides, and what an
actor holds ready."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from avatar_rl.actors.engine import stored_media
from avatar_rl.actors.engine.stored_media import StoredMedia
from avatar_rl.actors.spec import StoreSpec
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.workers.stored_media import store_spec
from avatar_rl.common.errors import ConfigError
from avatar_rl.prompts.embeddings.store import EmbeddingStore

ALL = ["visual", "audio_tower"]


def checkpoint(folder: Path, kind: str) -> Path:
    folder.mkdir()
    layers = ("model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv")
    save_file(
        {f"{name}.weight": np.ones((8, 8), np.float32) for name in layers},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def recipe(rollout: dict[str, Any], **learner: Any) -> RunConfig:
    settings = {"data": {"synthetic": {}}, "rollout": rollout, "learner": learner}
    return RunConfig.model_validate(settings)


ON: dict[str, Any] = {"stored_embeddings": True}


@pytest.mark.parametrize(
    ("kind", "learner", "on_gpu", "dtype"),
    [
        ("qwen2_5_omni", {"optimizer": {"freeze": ALL}}, False, "float32"),
        ("qwen2_5_omni", {"optimizer": {"freeze": ALL}}, True, "bfloat16"),
        ("qwen2_5_vl", {"optimizer": {"freeze": ["visual"]}}, False, "float32"),
        ("qwen3_vl", {"lora": {"rank": 4}}, False, "float32"),
    ],
)
def test_frozen_towers_let_rollouts_open_the_learners_store(
    tmp_path: Path, kind: str, learner: dict[str, Any], on_gpu: bool, dtype: str
) -> None:
    model = checkpoint(tmp_path / "model", kind)
    store = {"embeddings": {"folder": str(tmp_path / "store"), "bytes": 12}}
    config = recipe(ON, **learner, **store)
    assert store_spec(config, model, on_gpu=on_gpu) == StoreSpec(tmp_path / "store", 12, dtype)
    assert store_spec(recipe({}, **learner, **store), model, on_gpu=on_gpu) is None


@pytest.mark.parametrize(
    ("kind", "learner", "rollout", "said"),
    [
        ("qwen3", {}, {}, "'qwen3' has no vision or audio tower"),
        ("qwen2_5_vl", {}, {}, "the towers train: visual: add visual to learner.optimizer.freeze"),
        (
            "qwen2_5_omni",
            {"optimizer": {"freeze": ["visual"]}},
            {},
            "the towers train: audio_tower: add",
        ),
        (
            "qwen2_5_vl",
            {"lora": {"rank": 4, "targets": ["llm", "vision"]}},
            {},
            "learner.lora adapts 1 layers of towers or projectors, first visual.blocks.0.attn.qkv",
        ),
        (
            "qwen2_5_vl",
            {"optimizer": {"freeze": ALL}, "embeddings": {"mode": "off"}},
            {},
            "learner.embeddings.mode is off, which stores none",
        ),
        (
            "qwen2_5_vl",
            {"optimizer": {"freeze": ALL}},
            {"engine": {"dtype": "bfloat16"}},
            "the learner's embeddings are float32 and the engine computes in bfloat16",
        ),
    ],
)
def test_what_would_not_be_the_models_embeddings_is_refused_by_name(
    tmp_path: Path, kind: str, learner: dict[str, Any], rollout: dict[str, Any], said: str
) -> None:
    model = checkpoint(tmp_path / "model", kind)
    config = recipe(ON | rollout, **learner)
    with pytest.raises(ConfigError, match=r"rollout\.stored_embeddings is true, but ") as caught:
        store_spec(config, model, on_gpu=False)
    assert said in str(caught.value)
    assert str(caught.value).endswith("or set stored_embeddings to false")


def rendered(**places: int) -> Any:
    """A prompt with a picture of so many tokens for each name."""
    return {
        "type": "multimodal",
        "mm_hashes": {"image": list(places)},
        "mm_placeholders": {
            "image": [SimpleNamespace(get_num_embeds=lambda n=n: n) for n in places.values()]
        },
    }


def test_an_actor_holds_so_many_bytes_and_the_least_recently_fetched_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddingStore(tmp_path, 1 << 20)
    embeds = {name: torch.full((4, 2, 8), float(i)) for i, name in enumerate("abc")}
    for name, values in embeds.items():
        store.put(f"stored-{name}", {"embeds": values}, {})
    monkeypatch.setattr(stored_media, "HELD_BYTES", 2 * embeds["a"].nbytes)
    held = StoredMedia(store, "r")
    held.fetch(rendered(a=4))
    assert held.get("a") is None  # nobody has said what the store calls it
    held.note({name: f"stored-{name}" for name in "abcd"})
    held.fetch(rendered(a=4, b=4))
    found = held.get("a")
    assert found is not None and torch.equal(found, embeds["a"].reshape(4, 16))
    held.fetch(rendered(a=4))
    held.fetch(rendered(c=4, d=4))  # d is not in the store
    assert [held.get(name) is not None for name in "abcd"] == [True, False, True, False]
    held.fetch({"type": "token", "prompt_token_ids": [1]})  # type: ignore[arg-type]
