"""Tiny random checkpoints of every supported family, in-memory media, and a transformers scorer to
compare with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.encoding.template import EncodedPrompt
from avatar_rl.prompts.media.loader import (
    Decoded,
    DecodedAudio,
    DecodedImage,
    DecodedMedia,
    DecodedVideo,
    MediaLoader,
)
from avatar_rl.prompts.record import MediaItem, MediaPlan, ProblemType, Prompt

if TYPE_CHECKING:  # a worker imports all test files, and only some of them need transformers
    from transformers import PreTrainedTokenizerBase

END, PAD = "<|im_end|>", "<|endoftext|>"
VISION = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}"
    "{% else %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOUNDS = {"shortest_edge": 56 * 56, "longest_edge": 64 * 28 * 28}


def allowed_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that are safe to sample: every plain token and the end of turn.

    A media placeholder among a completion's tokens crashes the scoring pass, and rows beyond the
    tokenizer's length do not decode. Works for any Hugging Face tokenizer."""
    special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return [i for i in range(len(tokenizer)) if i == tokenizer.eos_token_id or i not in special]


class ArrayLoader(MediaLoader):
    """Media by URI from memory instead of files."""

    def __init__(self) -> None:
        super().__init__(MediaConfig(), Path("."))
        self.media: dict[str, Decoded] = {}
        self.loads = 0

    def load(self, item: MediaItem) -> Decoded:
        self.loads += 1
        return self.media[item.uri]

    def address(self, item: MediaItem) -> str:
        medium = self.media[item.uri]
        array = getattr(medium, {"video": "frames", "audio": "samples"}.get(item.kind, "pixels"))
        return hashlib.sha256(array.tobytes()).hexdigest()

    def load_plan(self, plan: MediaPlan) -> DecodedMedia:
        found = [self.load(item) for item in plan.items]
        return DecodedMedia(
            tuple(m for m in found if isinstance(m, DecodedVideo)),
            tuple(m for m in found if isinstance(m, DecodedAudio)),
            tuple(m for m in found if isinstance(m, DecodedImage)),
        )


def make_prompt(
    loader: ArrayLoader,
    name: str,
    media: list[Decoded],
    *,
    audio_in_video: bool = False,
    **fields: Any,
) -> Prompt:
    """A prompt over ``media`` in their order, registered with ``loader``."""
    items = []
    for index, decoded in enumerate(media):
        uri = f"{name}-{index}"
        loader.media[uri] = decoded
        if isinstance(decoded, DecodedAudio):
            items.append(MediaItem(kind="audio", uri=uri))
        else:
            kind = "video" if isinstance(decoded, DecodedVideo) else "image"
            items.append(MediaItem(kind=kind, uri=uri, min_pixels=56 * 56, max_pixels=64 * 28 * 28))
    plan = MediaPlan(items=tuple(items), audio_in_video=audio_in_video)
    values = {
        "question": "how many red",
        "answer": "1",
        "problem_type": ProblemType.FREE_FORM,
    } | fields
    return Prompt(id=name, media=plan, **values)


def video(seed: int, frames: int, fps: float, height: int = 56, width: int = 84) -> DecodedVideo:
    pixels = np.random.default_rng(seed).integers(
        0, 255, (frames, height, width, 3), dtype=np.uint8
    )
    return DecodedVideo(pixels, fps, frames / fps)


def audio(seed: int, seconds: float) -> DecodedAudio:
    samples = (
        np.random.default_rng(seed).standard_normal(int(16_000 * seconds)).astype(np.float32) * 0.1
    )
    return DecodedAudio(samples, 16_000)


def image(seed: int) -> DecodedImage:
    return DecodedImage(np.random.default_rng(seed).integers(0, 255, (84, 112, 3), dtype=np.uint8))


def respawn(source: Path, out: Path, seed: int, scale: float = 0.08) -> dict[str, torch.Tensor]:
    """Copy a checkpoint with its matrices drawn anew, wide enough that greedy outputs differ;
    returns its tensors."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(value.shape, generator=generator) * scale if value.dim() >= 2 else value
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return weights


def build_vision_language(out: Path, kind: str) -> Path:
    """A Qwen2.5-VL ("qwen2_5_vl"), Qwen3-VL ("qwen3_vl") or text-only Qwen3 ("qwen3")
    checkpoint."""
    import transformers as hf

    tokenizer = byte_tokenizer({} if kind == "qwen3" else VISION)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION.items()}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 64,
    }
    torch.manual_seed(0)
    if kind == "qwen3":
        model: Any = hf.Qwen3ForCausalLM(
            hf.Qwen3Config(**text, rope_parameters=rope, tie_word_embeddings=False)
        )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out
    if kind == "qwen2_5_vl":
        config: Any = hf.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}},
            vision_config=vision
            | {"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2},
            tie_word_embeddings=False,
            **ids,
        )
        model = hf.Qwen2_5_VLForConditionalGeneration(config)
        processor: Any = hf.Qwen2_5_VLProcessor(
            hf.Qwen2VLImageProcessor(size=BOUNDS),
            tokenizer,
            hf.Qwen2VLVideoProcessor(size=BOUNDS),
            TEMPLATE,
        )
    else:
        patches = {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        config = hf.Qwen3VLConfig(
            text_config=text
            | {"rope_parameters": rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}},
            vision_config=vision | patches,
            tie_word_embeddings=False,
            **ids,
        )
        model = hf.Qwen3VLForConditionalGeneration(config)
        # As published: one mean and deviation for images and videos. vLLM normalises both with the
        # images'.
        images = hf.Qwen2VLImageProcessor(
            patch_size=16, size=BOUNDS, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        processor = hf.Qwen3VLProcessor(
            images, tokenizer, hf.Qwen3VLVideoProcessor(size=BOUNDS), TEMPLATE
        )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def byte_tokenizer(named: Mapping[str, str]) -> Any:
    """One token per byte, the usual special tokens and those of media, ``named`` as processors
    look for them."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab={byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens=dict(named) or None,
    )
    special = [PAD, "<|im_start|>", END, *named.values()]
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load_reference(folder: Path) -> Any:
    """The transformers model of a checkpoint folder, float32, evaluation mode."""
    import transformers as hf

    kind = hf.AutoConfig.from_pretrained(folder).model_type
    classes = {
        "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
        "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
        "qwen3": "AutoModelForCausalLM",
        "gemma3_text": "AutoModelForCausalLM",
    }
    name = classes.get(kind, "AutoModelForImageTextToText")
    return getattr(hf, name).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: Any, prompt: EncodedPrompt, token_ids: np.ndarray) -> torch.Tensor:
    """(T, V) logits that predict each completion token, from one full forward with the prompt's own
    positions."""
    length, tokens = len(prompt.input_ids), len(token_ids)
    ids = torch.cat([prompt.input_ids, torch.from_numpy(token_ids).long()])[None]
    steps = (prompt.next_position + torch.arange(tokens)).expand(len(prompt.position_ids), -1)
    positions = torch.cat([prompt.position_ids, steps], 1)[:, None]  # (3 or 1, 1, L + T)
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions if len(positions) > 1 else positions[0],
        **prompt.features,
    )
    return output.logits[0, length - 1 : -1].float()


def logprobs_of(
    model: Any, prompt: EncodedPrompt, token_ids: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """(T,) log-probabilities of a completion at ``temperature``."""
    logits = logits_of(model, prompt, token_ids) / temperature
    return (
        torch.log_softmax(logits, -1)
        .gather(1, torch.from_numpy(token_ids).long()[:, None])[:, 0]
        .numpy()
    )
