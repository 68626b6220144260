"""A model loaded in shares by two ranks is the model that one process loads whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import avatar_rl.learner.engine
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.config import OptimizerConfig
from avatar_rl.learner.engine import FrozenEngine, TrainEngine, deepspeed_config
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.model import load, stand_in
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.model.sharded_load import load_in_shares
from avatar_rl.prompts.encoding.template import EncodedPrompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_families import FAMILIES
from tests.tiny_models import build_vision_language

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_sharded_load"
KINDS = ("omni", "qwen3_vl", "tied", "experts")
LORA = LoraConfig(rank=4, alpha=16, targets=("llm",))
ZERO3 = OptimizerConfig(lr=0.01, zero_stage=3, dtype="float32")


def rows(axes: int) -> list[Row]:
    rng = np.random.default_rng(0)
    prompt = EncodedPrompt(torch.arange(40, 52), torch.arange(12).expand(axes, -1), 12)
    return [Row(("p", False), prompt, rng.integers(30, 200, n).astype(np.int32)) for n in (5, 9)]


def adapted(model: nn.Module, ranks: int) -> dict[str, Any]:
    """An adapter on ``model`` after an update, and what of the whole this rank holds."""
    adapter = Adapter.attach(model, LORA, seed=1)
    engine = TrainEngine(
        Policy(model).eval(), ZERO3, world_size=ranks, dtype="float32", adapter=adapter
    )
    held = sum(p.ds_tensor.numel() for p in model.parameters())
    batch = collate(rows(3))
    engine.accumulate([batch], lambda _, __, output: output.logprobs.sum() * 0.01, batch)
    norm = engine.step(0.01)
    share = held / sum(p.ds_numel for p in model.parameters())
    return {"adapter": engine.adapter_state(), "norm": norm, "share": share}


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    avatar_rl.learner.engine.WHOLE_BELOW = 0
    found = {}
    for kind in KINDS:
        config = deepspeed_config(ZERO3, ranks, "float32")
        model = load_in_shares(folder / kind, dtype="float32", deepspeed_config=config)
        held = sum(p.ds_tensor.numel() for p in model.parameters())
        whole = sum(p.ds_numel for p in model.parameters())
        engine = TrainEngine(Policy(model), ZERO3, world_size=ranks, dtype="float32")
        scores = engine.score(collate(rows(1 if kind == "tied" else 3))).logprobs
        found[kind] = {
            "weights": engine.state_dict(),
            "scores": scores,
            "share": held / whole,
        }
    # Parameters that DeepSpeed splits are told by what it puts on them.
    shared = load_in_shares(folder / "omni", dtype="float32", deepspeed_config=config)
    found["lora"] = adapted(shared, ranks)
    found["lora_whole"] = adapted(load_model(folder / "omni"), ranks)
    frozen = Policy(load_in_shares(folder / "omni", dtype="float32", deepspeed_config=config))
    reference = FrozenEngine(frozen, ZERO3, world_size=ranks, dtype="float32")
    batches = [collate(rows(3)[:1]), collate(rows(3))][: rank + 1]
    scored = reference.score(batches, batches[0], [True] * len(batches))
    found["reference"] = {
        "scores": {number: output.logprobs for number, output in scored},
        "held": sum(p.ds_tensor.numel() for p in frozen.parameters())
        / sum(p.ds_numel for p in frozen.parameters()),
    }
    try:
        load_in_shares(folder / "wrong", dtype="float32", deepspeed_config=config)
    except ModelError as error:
        found["wrong"] = str(error)
    return found


def test_two_ranks_hold_half_each_and_score_like_one(tmp_path: Path) -> None:
    build_tiny_omni(tmp_path / "omni")
    build_vision_language(tmp_path / "qwen3_vl", "qwen3_vl")
    FAMILIES["qwen3_vl_moe"](tmp_path / "experts")
    text = hf.Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    hf.Qwen2ForCausalLM(text).save_pretrained(tmp_path / "tied")
    hf.Qwen2ForCausalLM(text).save_pretrained(tmp_path / "wrong")
    weights = load_file(tmp_path / "wrong" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:100]
    save_file(weights, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    run_ranks(MODULE, tmp_path, 2)
    for kind in KINDS:
        policy = Policy(load_model(tmp_path / kind)).eval()
        expected = {n.removeprefix("model."): p for n, p in policy.named_parameters()}
        with torch.no_grad():
            scores = policy(collate(rows(1 if kind == "tied" else 3))).logprobs
        for rank in range(2):
            found = rank_results(tmp_path, kind, 2, rank)
            assert found["share"] == pytest.approx(0.5, abs=0.01)
            assert expected.keys() <= found["weights"].keys()
            for one, value in expected.items():
                assert torch.equal(found["weights"][one], value), (kind, one)
            assert (found["scores"] - scores).abs().max() <= 1e-5
    for rank in range(2):
        assert name in rank_results(tmp_path, "wrong", 2, rank)
        assert "copy both again" in rank_results(tmp_path, "wrong", 2, rank)

    policy = Policy(load_model(tmp_path / "omni")).eval()
    with torch.no_grad():
        of_reference = [policy(collate(rows(3)[:1])).logprobs, policy(collate(rows(3))).logprobs]
    for rank in range(2):
        found, whole = (rank_results(tmp_path, name, 2, rank) for name in ("lora", "lora_whole"))
        assert found["share"] == pytest.approx(0.5, abs=0.01)
        assert found["norm"] == pytest.approx(whole["norm"], rel=1e-5) and found["norm"] > 1e-3
        for name, value in whole["adapter"].items():
            assert (found["adapter"][name] - value).abs().max() <= 1e-6, name
        reference = rank_results(tmp_path, "reference", 2, rank)
        assert reference["held"] == pytest.approx(0.5, abs=0.01)
        # A rank with fewer micro-batches runs with the other one, and is told of its own alone.
        assert len(reference["scores"]) == rank + 1
        for number, scores in reference["scores"].items():
            assert (scores - of_reference[number]).abs().max() <= 1e-5


def test_a_model_loaded_tensor_by_tensor_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("omni", "experts"):
        (build_tiny_omni if kind == "omni" else FAMILIES["qwen3_vl_moe"])(tmp_path / kind)
        whole = load_model(tmp_path / kind)
        placed = load_model(tmp_path / kind, device=torch.device("cpu"))
        expected = dict(whole.state_dict())
        found = placed.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert not any(hasattr(module, "_hf_hook") for module in placed.modules())
    # Where there is no small model of the kind, the model itself is tried.
    tried: list[str] = []
    monkeypatch.setattr(load, "check_scores", lambda model, kind: tried.append(kind))
    load_model(tmp_path / "omni", device=torch.device("cpu"))
    assert tried == []

    def unknown(config: Any) -> Any:
        raise IndexError("layers")

    monkeypatch.setattr(stand_in, "_small", unknown)
    load_model(tmp_path / "omni", device=torch.device("cpu"))
    assert tried == ["qwen2_5_omni"]


if __name__ == "__main__":
    rank_main(work)
