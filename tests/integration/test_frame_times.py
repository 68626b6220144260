"""The engine's own type must not move a clip's frames in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avatar_rl.actors.config import EngineConfig
from avatar_rl.actors.engine.engine import RolloutEngine
from avatar_rl.prompts.encoding.template import PromptEncoder, TemplateConfig, _seconds_per_grid
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.tiny_models import ArrayLoader, build_vision_language, make_prompt, video


@pytest.mark.parametrize("kind", ["qwen2_5_omni", "qwen2_5_vl"])
def test_in_bfloat16_too_frames_have_the_learners_time(kind: str, tmp_path: Path) -> None:
    """Whatever the clip's rate, and without a processor of its own for each."""
    from vllm.transformers_utils.processor import cached_get_processor

    folder = (
        build_tiny_omni(tmp_path)
        if kind == "qwen2_5_omni"
        else build_vision_language(tmp_path, kind)
    )
    loader = ArrayLoader()
    encoder = PromptEncoder(folder, loader, TemplateConfig())
    engine = RolloutEngine(
        folder, EngineConfig(device="cpu", dtype="bfloat16", max_model_len=1024, max_num_seqs=8)
    )
    loads = []
    try:
        for seed, fps in enumerate((60 / 30.9, 64 / 61.7, 64 / 118.3, 20 / 9.985)):
            prompt = make_prompt(loader, f"clip-{seed}", [video(seed, 8, fps)])
            rendered = engine.prepare(encoder.engine_input(prompt, False))
            loads.append(cached_get_processor.cache_info().misses)
            [item] = rendered["mm_kwargs"]["video"]
            seconds = float(item["second_per_grid_ts"].data)
            assert seconds == float(torch.tensor(_seconds_per_grid(fps), dtype=torch.float32))
    finally:
        engine.close()
    assert len(set(loads)) == 1, "a processor was loaded for a rate"
