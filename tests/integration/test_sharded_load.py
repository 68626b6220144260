"""A model loaded in shares by two ranks is the model that one process loads whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.config import OptimizerConfig
from avatar_rl.learner.engine import TrainEngine, deepspeed_config
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.model.sharded_load import load_in_shares
from avatar_rl.prompts.encoding.template import EncodedPrompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import build_vision_language

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_sharded_load"
KINDS = ("omni", "qwen3_vl", "tied")
ZERO3 = OptimizerConfig(lr=0.01, zero_stage=3, dtype="float32")


def rows(axes: int) -> list[Row]:
    rng = np.random.default_rng(0)
    prompt = EncodedPrompt(torch.arange(40, 52), torch.arange(12).expand(axes, -1), 12)
    return [Row(("p", False), prompt, rng.integers(30, 200, n).astype(np.int32)) for n in (5, 9)]


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        config = deepspeed_config(ZERO3, ranks, "float32")
        # Else DeepSpeed leaves every tensor of a tiny model whole.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # type: ignore
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
    try:
        load_in_shares(folder / "wrong", dtype="float32", deepspeed_config=config)
    except ModelError as error:
        found["wrong"] = str(error)
    return found


def test_two_ranks_hold_half_each_and_score_like_one(tmp_path: Path) -> None:
    build_tiny_omni(tmp_path / "omni")
    build_vision_language(tmp_path / "qwen3_vl", "qwen3_vl")
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


if __name__ == "__main__":
    rank_main(work)
