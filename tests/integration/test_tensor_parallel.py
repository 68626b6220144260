"""One engine over two processes: the same probabilities, before and after weights come by the
board and by the gloo twin, whose members are the two workers, for a dense model and a mixture of
experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatar_rl.actors.config import EngineConfig, RequestSampling
from tests.parity_stage import Stage, layouts_of

#: Starting two workers takes half a minute on a busy machine.
pytestmark = pytest.mark.timeout(300)
TOLERANCE = 1e-5
LAYOUTS = {
    "qwen2_5_omni": ("text", "image", "interleaved, 2 fps"),
    "qwen3_vl_moe": ("text", "two images", "video, 1 fps"),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_two_shares_of_a_model_are_the_model(tmp_path: Path, family: str) -> None:
    config = EngineConfig(device="cpu", max_model_len=512, max_num_seqs=8, tensor_parallel_size=2)
    stage = Stage(tmp_path, family, config)
    try:
        layouts = {name: layouts_of(family)[name] for name in LAYOUTS[family]}
        prompts = stage.prompts(layouts)
        sampling = RequestSampling(n=2, max_tokens=12)
        for seed, road in enumerate(("", "board", "twin", "twin")):
            if seed:
                stage.train(seed)
                stage.publish(road)
            gaps = stage.gaps(prompts, sampling)
            print(seed, {name: f"{gap.logprob:.1e}" for name, gap in gaps.items()})
            assert max(gap.logprob for gap in gaps.values()) <= TOLERANCE, gaps
    finally:
        stage.close()
