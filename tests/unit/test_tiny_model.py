"""The tiny Omni: layout, tokenizer, chat template, ids that are safe to sample, and a forward over
real media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from avatar_rl.common.errors import DataError
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.encoding.template import PromptEncoder, TemplateConfig
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.tiny_model import (
    EOS,
    MEDIA_TOKENS,
    TAG_TOKENS,
    VOCABULARY,
    build_tiny_omni,
)
from avatar_rl.prompts.synthetic.world import synthesize
from tests.tiny_models import allowed_token_ids


@pytest.fixture(scope="module")
def model_path(tiny_omni: Path) -> Path:
    return tiny_omni


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = WorldConfig(n_train=10, n_heldout=0, n_sft=60)
    return synthesize(tmp_path_factory.mktemp("world") / "w", config).out


@pytest.fixture(scope="module")
def encoder(model_path: Path, world: Path) -> PromptEncoder:
    return PromptEncoder(model_path, MediaLoader(MediaConfig(), world), TemplateConfig())


def prompts_of(world: Path, split: str) -> list[Prompt]:
    return [
        Prompt.model_validate_json(line)
        for line in (world / f"{split}.jsonl").read_text().splitlines()
    ]


def load_thinker(model_path: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        model_path, output_loading_info=True
    )


def test_folder_has_the_published_layout(model_path: Path) -> None:
    config = json.loads((model_path / "config.json").read_text())
    assert (
        config["architectures"] == ["Qwen2_5OmniModel"] and config["model_type"] == "qwen2_5_omni"
    )
    weights = load_file(model_path / "model.safetensors")
    assert all(name.startswith("thinker.") for name in weights)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert 0.7e6 < sum(tensor.numel() for tensor in weights.values()) < 1.5e6
    text = config["thinker_config"]["text_config"]
    head = text["hidden_size"] // text["num_attention_heads"]
    assert head >= 32 and sum(text["rope_parameters"]["mrope_section"]) == head // 2


def test_transformers_load_every_tensor(model_path: Path) -> None:
    model, info = load_thinker(model_path)
    assert not any(info.values()), info
    weights = load_file(model_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"thinker.{name}"]), name


def test_same_seed_gives_the_same_files_whatever_the_callers_random_state(
    model_path: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = build_tiny_omni(tmp_path / "again")
    assert torch.equal(torch.rand(3), expected)  # which is left alone
    for path in sorted(model_path.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    other = build_tiny_omni(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (
        model_path / "model.safetensors"
    ).read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (model_path / "tokenizer.json").read_bytes()


def test_tags_are_single_plain_tokens(encoder: PromptEncoder) -> None:
    tokenizer = encoder.tokenizer
    for tag in TAG_TOKENS:
        assert tokenizer.convert_ids_to_tokens(tokenizer(tag)["input_ids"]) == [tag]
    ids = tokenizer("<think>so red</think><answer>red</answer>" + EOS)["input_ids"]
    assert (
        tokenizer.decode(ids, skip_special_tokens=True)
        == "<think>so red</think><answer>red</answer>"
    )
    assert ids[-1] == tokenizer.eos_token_id


def test_tokenizer_round_trips_any_text(encoder: PromptEncoder) -> None:
    for text in ("Left: low / Right: high", "naïve 日本 🙂\n\t 12.5%", "A. left\nB. right"):
        assert encoder.tokenizer.decode(encoder.tokenizer(text)["input_ids"]) == text


def test_lengths_stay_small(encoder: PromptEncoder, world: Path) -> None:
    for prompt in prompts_of(world, "sft"):
        target = f"<think>{prompt.reasoning}</think><answer>{prompt.answer}</answer>{EOS}"
        assert 55 <= len(encoder.encode(prompt, hinted=False).input_ids) <= 90
        assert len(encoder.encode(prompt, hinted=True).input_ids) <= 120
        assert 8 <= len(encoder.tokenizer(target)["input_ids"]) <= 35


def test_allowed_ids_are_safe_to_sample(encoder: PromptEncoder) -> None:
    tokenizer = encoder.tokenizer
    allowed = allowed_token_ids(tokenizer)
    assert (
        len(tokenizer) < VOCABULARY
        and max(allowed) < len(tokenizer)
        and len(set(allowed)) == len(allowed)
    )
    assert tokenizer.eos_token_id in allowed
    forbidden = {
        tokenizer.convert_tokens_to_ids(t)
        for t in (*MEDIA_TOKENS.values(), "<|im_start|>", "<|endoftext|>")
    }
    assert not forbidden & set(allowed)
    assert len(allowed) == len(tokenizer) - len(forbidden)
    assert {tokenizer.convert_tokens_to_ids(tag) for tag in TAG_TOKENS} <= set(allowed)


def test_chat_template_renders_parts_in_order(encoder: PromptEncoder) -> None:
    parts = [{"type": kind, kind: ""} for kind in ("audio", "image", "video")]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]},
    ]
    assert encoder.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|><|vision_bos|><|IMAGE|><|vision_eos|>"
        "<|vision_bos|><|VIDEO|><|vision_eos|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = encoder.processor.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert plain == "<|im_start|>user\nHi<|im_end|>\n"


def test_chat_template_refuses_unknown_parts(encoder: PromptEncoder) -> None:
    with pytest.raises(Exception, match="smell"):
        encoder.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "smell"}]}], tokenize=False
        )


def test_forward_takes_video_and_audio(
    encoder: PromptEncoder, model_path: Path, world: Path
) -> None:
    model, _ = load_thinker(model_path)
    encoded = encoder.encode(prompts_of(world, "train")[0], hinted=False)
    ids = encoded.input_ids
    assert int((ids == model.config.video_token_id).sum()) == 12  # 4 slots of 3 places
    assert int((ids == model.config.audio_token_id).sum()) == 32  # 25 a second for 1.28 s
    with torch.no_grad():
        logits = model(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids)[None],
            position_ids=encoded.position_ids[:, None],
            **encoded.features,
        ).logits
    assert logits.shape == (1, len(ids), VOCABULARY) and torch.isfinite(logits).all()
    # a random model is near the uniform distribution: larger first losses would slow the cold start
    # down
    entropy = torch.distributions.Categorical(logits=logits[0, -1]).entropy()
    assert 0.85 * torch.log(torch.tensor(VOCABULARY)) < entropy


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="already holds something"):
        build_tiny_omni(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
