"""Engine and learner see one prompt: token ids, and log-probabilities against a full transformers
forward, before and after weights that were published and adopted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from avatar_rl.actors.config import RequestSampling
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.media.loader import DecodedImage, MediaLoader
from avatar_rl.prompts.record import MediaItem
from tests.parity_stage import OMNI, TEXT, Layouts, Stage
from tests.tiny_families import FAMILIES
from tests.tiny_models import audio, make_prompt, video

TOLERANCE = 1e-5  # float32; measured 3e-6
TWIN = ("qwen2_5_omni", "qwen3_vl_moe")  # a dense model and a mixture of experts


@pytest.fixture(scope="module", params=FAMILIES)
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("models"), request.param)
    yield stage
    stage.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_logprobs_equal_a_full_transformers_forward(
    stage: Stage, temperature: float
) -> None:
    sampling = RequestSampling(n=2, temperature=temperature, max_tokens=24)
    gaps = {name: gap.logprob for name, gap in stage.gaps(stage.prompts(), sampling).items()}
    print({name: f"{gap:.1e}" for name, gap in gaps.items()})
    # At a temperature below 1 differences grow by as much.
    assert max(gaps.values()) <= TOLERANCE / temperature, gaps


def test_system_options_instruction_and_hint_reach_both_sides(stage: Stage) -> None:
    prompt = make_prompt(
        stage.loader,
        "worded",
        [],
        system="be brief",
        options=("A. red", "B. blue"),
        hint="look at the left",
    )
    plain, hinted = stage.encoder.encode(prompt, False), stage.encoder.encode(prompt, True)
    assert len(hinted.input_ids) > len(plain.input_ids)
    [done] = stage.run([prompt], RequestSampling(max_tokens=8), hinted=True)
    assert stage.gap(prompt, done, hinted=True).logprob <= TOLERANCE


def test_logprobs_are_those_of_the_whole_distribution_when_top_k_truncates(
    stage: Stage,
) -> None:
    prompt = make_prompt(stage.loader, "text", [])
    [done] = stage.run([prompt], RequestSampling(n=2, top_k=3, max_tokens=24))
    assert stage.gap(prompt, done).logprob <= TOLERANCE


def test_videos_within_a_total_are_the_same_tokens_on_both_sides(stage: Stage) -> None:
    """Prompt tokens are compared one by one, log-probabilities as elsewhere."""
    if stage.family in TEXT:
        return
    media: Layouts = {
        "long": ([video(30, 16, 2.0, 160, 224)], False),
        "two": ([video(31, 16, 3.3, 160, 224), video(32, 8, 3.3, 160, 224)], False),
    }
    if stage.family in OMNI:
        media["heard"] = ([video(33, 16, 4.0, 160, 224), audio(34, 3.9)], True)
    whole, total = stage.encoder, 120
    stage.encoder = PromptEncoder(
        stage.folder, stage.loader, TemplateConfig(total_video_tokens=total)
    )
    try:
        prompts = stage.prompts(media)
        gaps = stage.gaps(prompts, RequestSampling(temperature=0, max_tokens=8))
        token = whole.positions.config.video_token_id
        counts = [
            [int((side.encode(prompt, False).input_ids == token).sum()) for prompt in prompts]
            for side in (whole, stage.encoder)
        ]
    finally:
        stage.encoder = whole
    assert max(gap.logprob for gap in gaps.values()) <= TOLERANCE, gaps
    assert min(counts[0]) > total >= max(counts[1]) >= total // 2, counts


@torch.no_grad()
def test_a_pack_of_prompts_is_scored_as_the_engine_sampled_it(stage: Stage) -> None:
    prompts = stage.prompts()[::4]
    done = stage.run(prompts, RequestSampling(n=2, max_tokens=12))
    parts = [
        (Row((prompt.id, False), stage.encoder.encode(prompt, False), part.token_ids), part)
        for prompt, finished in zip(prompts, done, strict=True)
        for part in finished.completions
    ]
    policy = Policy(stage.model)
    try:
        found = policy(collate([row for row, _ in parts])).logprobs
    finally:
        policy.release()
    for ours, (row, part) in zip(found, parts, strict=True):
        gap = np.abs(ours[: len(part.logprobs)].numpy() - part.logprobs).max()
        assert gap <= TOLERANCE, (row.key, gap)


def test_three_published_versions_are_decoded_as_the_learner_has_them(stage: Stage) -> None:
    """Names, layouts and packed storage: an update that leaves a tensor as it was, or puts it
    wrong, moves log-probabilities by nats."""
    # Every third layout of media: the others differ in positions, which no weight moves.
    prompts = stage.prompts()[::3]
    greedy = RequestSampling(temperature=0, max_tokens=16)
    before = stage.run(prompts, greedy)
    # Of those that come by the twin each worker takes what it needs from its own memory.
    roads = ["board"] * 3 + (["twin"] * 3 if stage.family in TWIN else [])
    for seed, road in enumerate(roads, 1):
        stage.train(seed)
        stage.publish(road)
        gaps = stage.gaps(prompts, greedy)
        print(road, {name: f"{gap.logprob:.1e}" for name, gap in gaps.items()})
        assert max(gap.logprob for gap in gaps.values()) <= TOLERANCE, gaps
        assert all(gap.greedy == 0 for gap in gaps.values()), gaps
    after = stage.run(prompts, greedy)
    assert any(
        one.completions[0].token_ids.tolist() != other.completions[0].token_ids.tolist()
        for one, other in zip(before, after, strict=True)
    )


def test_transparency_is_composed_as_vllm_does(tmp_path: Path) -> None:
    module = pytest.importorskip("vllm.multimodal.image")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "soft.png")
    item = MediaItem(kind="image", uri="soft.png")
    decoded = MediaLoader(MediaConfig(), tmp_path).load(item)
    assert isinstance(decoded, DecodedImage)
    np.testing.assert_array_equal(
        decoded.pixels, module.convert_image_mode(Image.fromarray(pixels), "RGB")
    )


def test_a_layer_that_would_keep_its_old_weights_is_named_or_packed_again() -> None:
    from avatar_rl.actors.engine.vllm_plugin.worker import WorkerExtension

    class Layer(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(size))
            self.cpu_linear = object()
            self.quant_method = SimpleNamespace(
                process_weights_after_loading=lambda layer: setattr(layer, "cpu_linear", "packed")
            )

    model = nn.ModuleDict({"loaded": Layer(0), "tied": Layer(2), "stale": Layer(0)})
    worker: Any = WorkerExtension()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    worker.reload_weights = lambda weights_iterator: setattr(
        model["loaded"], "cpu_linear", object()
    )
    with pytest.raises(RuntimeError, match="layer 'stale' kept the weights of before"):
        worker.adopt_weights([])
    del model["stale"]
    worker.adopt_weights([])
    assert model["tied"].cpu_linear == "packed" != model["loaded"].cpu_linear
