"""The adapter road on mixtures of experts, on dense models and over two processes: greedy tokens
and log-probabilities are those of the learner's own model, before and after three adoptions, and of
an engine that takes the same versions merged."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.learner.lora_config import LoraConfig
from tests.parity_stage import TEXT, Stage, layouts_of

#: Starting two workers takes half a minute on a busy machine.
pytestmark = pytest.mark.timeout(400)
TOLERANCE = 1e-5
LORA = LoraConfig(rank=6, alpha=12.0)
GREEDY = RequestSampling(temperature=0, max_tokens=16, ignore_eos=True)
SAMPLED = RequestSampling(n=2, max_tokens=12)
VERSIONS = 3
LAYOUTS = ("text", "image", "interleaved, 2 fps")  # those of them that a family has
FAMILIES = ("qwen3_vl_moe", "qwen3_omni_moe", "tied", "gemma3")
#: A dense model with biases, and a mixture of experts; both have fewer heads of keys than workers
#: or as many.
SHARED = ("qwen2_5_omni", "qwen3_vl_moe")


@pytest.mark.parametrize(
    ("family", "shares"),
    [*((family, 1) for family in FAMILIES), *((family, 2) for family in SHARED)],
)
def test_an_adapter_is_the_learners_model(tmp_path: Path, family: str, shares: int) -> None:
    config = EngineConfig(
        device="cpu", max_model_len=512, max_num_seqs=8, tensor_parallel_size=shares
    )
    stage = Stage(tmp_path, family, config, LORA)
    layouts = {name: media for name, media in layouts_of(family).items() if name in LAYOUTS}
    assert len(layouts) == (1 if family in TEXT else 3 if "omni" in family else 2)
    prompts = stage.prompts(layouts)

    def greedy(road: str, seed: int) -> list[list[int]]:
        """After version ``seed`` by ``road``; version 0 is the base."""
        if seed:
            stage.train_adapter(seed)
            stage.publish(road)
        done = stage.run(prompts, GREEDY)
        pairs = zip(prompts, done, strict=True)
        gaps = {prompt.id: stage.gap(prompt, one) for prompt, one in pairs}
        for name, gap in stage.gaps(prompts, SAMPLED).items():
            gaps[f"{name}, sampled"] = gap._replace(greedy=0.0)
        print(road, seed, {name: f"{gap.logprob:.1e}" for name, gap in gaps.items()})
        assert max(gap.logprob for gap in gaps.values()) <= TOLERANCE, gaps
        assert not any(gap.greedy for gap in gaps.values()), gaps
        return [one.completions[0].token_ids.tolist() for one in done]

    try:
        found = [greedy("adapter", seed) for seed in range(VERSIONS + 1)]
        assert len({str(tokens) for tokens in found}) == VERSIONS + 1  # an adapter does something
        stage.serve_merged()
        assert [greedy("board", seed) for seed in range(1, VERSIONS + 1)] == found[1:]
    finally:
        stage.close()
