"""Engine and learner see one prompt: token ids, and log-probabilities against a full transformers
forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest, RolloutEngine
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.encoding.template import PromptEncoder, TemplateConfig
from avatar_rl.prompts.media.loader import DecodedImage, MediaLoader
from avatar_rl.prompts.record import MediaItem, Prompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.tiny_models import (
    ArrayLoader,
    audio,
    build_vision_language,
    image,
    load_reference,
    logprobs_of,
    make_prompt,
    respawn,
    video,
)

TOLERANCE = 1e-4  # float32; measured 3e-6


class Setting:
    """One model: engine, encoder and transformers reference on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.loader = ArrayLoader()
        self.encoder = PromptEncoder(folder, self.loader, TemplateConfig())
        self.reference = load_reference(folder)
        self.engine = RolloutEngine(
            folder, EngineConfig(device="cpu", max_model_len=1024, max_num_seqs=32)
        )

    def run(
        self, prompts: list[Prompt], sampling: RequestSampling, *, hinted: bool = False
    ) -> list[FinishedRequest]:
        for seed, prompt in enumerate(prompts):
            self.engine.submit(
                prompt.id, self.encoder.engine_input(prompt, hinted), sampling, seed=seed
            )
        finished: dict[str, FinishedRequest] = {}
        while self.engine.in_flight:
            finished |= {done.request_id: done for done in self.engine.step()}
        return [finished[prompt.id] for prompt in prompts]

    def gap(
        self,
        prompt: Prompt,
        done: FinishedRequest,
        temperature: float = 1.0,
        *,
        hinted: bool = False,
    ) -> float:
        """Largest log-probability difference over all completions; fails when the prompt tokens
        differ."""
        encoded = self.encoder.encode(prompt, hinted)
        np.testing.assert_array_equal(done.prompt_token_ids, encoded.input_ids.numpy())
        assert prompt_digest(done.prompt_token_ids) == encoded.digest
        gaps = [
            np.abs(
                logprobs_of(self.reference, encoded, part.token_ids, temperature) - part.logprobs
            ).max()
            for part in done.completions
        ]
        return float(max(gaps))


@pytest.fixture(scope="module", params=["qwen2_5_omni", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("models")
    if request.param == "qwen2_5_omni":
        base = build_tiny_omni(folder / "base")
    else:
        base = build_vision_language(folder / "base", request.param)
    respawn(base, folder / "model", seed=1)
    setting = Setting(folder / "model")
    yield setting
    setting.engine.close()


def cases(setting: Setting) -> list[Prompt]:
    """Every kind and arrangement of media the model takes; frame rates off the default and clips
    longer than wide."""
    loader, kind = setting.loader, setting.encoder.kind
    layouts: dict[str, tuple[list[Any], bool]] = {"text": ([], False)}
    if kind != "qwen3":
        layouts |= {
            "image": ([image(1)], False),
            "two images": ([image(2), image(3)], False),
            "video": ([video(4, 4, 2.0)], False),
            "long video then image": ([video(5, 16, 3.3), image(6)], False),
            "two videos": ([video(7, 8, 1.7), video(8, 8, 1.7)], False),
        }
    if kind == "qwen2_5_omni":
        layouts |= {
            "audio": ([audio(9, 3.0)], False),
            "video and audio": ([video(10, 8, 2.0), audio(11, 3.0)], False),
            "audio then video": ([audio(12, 1.2), video(13, 4, 10 / 3)], False),
            "interleaved": ([video(14, 8, 2.0), audio(15, 3.9)], True),
            "interleaved, other rate": ([video(16, 4, 10 / 3), audio(17, 1.2)], True),
            "interleaved, slow": ([video(18, 4, 1.0), audio(19, 3.9)], True),
            "interleaved, sound ends early": ([video(20, 16, 2.0), audio(21, 2.5)], True),
            "interleaved twice and image": (
                [video(22, 8, 4.55), audio(23, 1.5), video(24, 4, 4.55), audio(25, 2.5), image(26)],
                True,
            ),
        }
    return [
        make_prompt(loader, name, media, audio_in_video=av) for name, (media, av) in layouts.items()
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_logprobs_equal_a_full_transformers_forward(
    setting: Setting, temperature: float
) -> None:
    prompts = cases(setting)
    sampling = RequestSampling(n=2, temperature=temperature, max_tokens=24)
    gaps = {
        prompt.id: setting.gap(prompt, done, temperature)
        for prompt, done in zip(prompts, setting.run(prompts, sampling), strict=True)
    }
    print({name: f"{gap:.1e}" for name, gap in gaps.items()})
    assert max(gaps.values()) <= TOLERANCE, gaps


def test_system_options_instruction_and_hint_reach_both_sides(setting: Setting) -> None:
    prompt = make_prompt(
        setting.loader,
        "worded",
        [],
        system="be brief",
        options=("A. red", "B. blue"),
        hint="look at the left",
    )
    plain, hinted = setting.encoder.encode(prompt, False), setting.encoder.encode(prompt, True)
    assert len(hinted.input_ids) > len(plain.input_ids)
    [done] = setting.run([prompt], RequestSampling(max_tokens=8), hinted=True)
    assert setting.gap(prompt, done, hinted=True) <= TOLERANCE


def test_logprobs_are_those_of_the_whole_distribution_when_top_k_truncates(
    setting: Setting,
) -> None:
    prompt = make_prompt(setting.loader, "text", [])
    [done] = setting.run([prompt], RequestSampling(n=2, top_k=3, max_tokens=24))
    assert setting.gap(prompt, done) <= TOLERANCE


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
