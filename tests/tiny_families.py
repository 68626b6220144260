"""A tiny random checkpoint of every family that is trained here, in the layout in which it is
published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.tiny_models import BOUNDS, VISION, build_vision_language, byte_tokenizer

OMNI = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
OMNI_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}"
    "{% elif c.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% else %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
}
EXPERTS: dict[str, Any] = TEXT | {
    "tie_word_embeddings": False,
    # no multiple of 32, which vLLM's packed experts have to be padded to
    "moe_intermediate_size": 48,
    "num_experts": 12,  # expert 10 sorts behind expert 9
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
# vLLM's omni tower sizes its positions by (image_size // patch_size) ** 2, transformers by the
# number.
TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
#: Of a processor with one mean and deviation for images and videos, as published.
PATCHES: dict[str, Any] = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def qwen3_omni_moe(out: Path) -> Path:
    """The thinker of a Qwen3-Omni: one tensor per expert, all under ``thinker.``."""
    import transformers as hf

    tokenizer = byte_tokenizer(OMNI)
    tokenizer.chat_template = OMNI_TEMPLATE
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in OMNI.items()}
    thinker = hf.Qwen3OmniMoeThinkerConfig(
        text_config=EXPERTS,
        vision_config=TOWER | {"image_size": 128, "apply_vit_abs_pos_embed": True},
        audio_config={
            "num_mel_bins": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "d_model": 64,
            "output_dim": 64,
            "downsample_hidden_size": 32,
            "n_window": 50,
            "n_window_infer": 800,
            "max_source_positions": 1500,
        },
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        audio_token_id=ids["audio_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        position_id_per_seconds=13,
        seconds_per_chunk=2,
        user_token_id=tokenizer.encode("u")[0],
    )
    torch.manual_seed(0)
    hf.Qwen3OmniMoeThinkerForConditionalGeneration(thinker).float().save_pretrained(out)
    hf.Qwen3OmniMoeProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=BOUNDS, **PATCHES),
        video_processor=hf.Qwen2VLVideoProcessor(size=BOUNDS, **PATCHES),
        feature_extractor=hf.WhisperFeatureExtractor(
            feature_size=32,
            sampling_rate=16_000,
            hop_length=160,
            n_fft=400,
            chunk_length=30,
            return_attention_mask=True,
        ),
        tokenizer=tokenizer,
        chat_template=OMNI_TEMPLATE,
    ).save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    save_file(
        {f"thinker.{name}": tensor for name, tensor in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = json.loads((out / "config.json").read_text())
    for key in ("architectures", "transformers_version", "dtype"):
        settings.pop(key, None)
    top = {
        "model_type": "qwen3_omni_moe",
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "dtype": "float32",
        "enable_audio_output": False,
        "thinker_config": settings,
    }
    (out / "config.json").write_text(json.dumps(top, indent=1))
    return out


def qwen3_vl_moe(out: Path) -> Path:
    """A Qwen3-VL-MoE: all experts of a layer in one tensor, the last two axes swapped."""
    import transformers as hf

    tokenizer = byte_tokenizer(VISION)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION.items()}
    config = hf.Qwen3VLMoeConfig(
        text_config=EXPERTS, vision_config=TOWER, tie_word_embeddings=False, **ids
    )
    torch.manual_seed(0)
    hf.Qwen3VLMoeForConditionalGeneration(config).float().save_pretrained(out)
    hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(size=BOUNDS, **PATCHES),
        tokenizer,
        hf.Qwen3VLVideoProcessor(size=BOUNDS, cap_pixels_per_frame=False, **PATCHES),
        tokenizer.chat_template,
    ).save_pretrained(out)
    swap_experts(out)
    return out


def swap_experts(folder: Path) -> None:
    """Between the published layout of Qwen3-VL-MoE's experts and the one that save_pretrained
    writes, which is the module's own and which vLLM does not read."""
    weights = {
        name: tensor.transpose(1, 2).contiguous() if "mlp.experts." in name else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def tied_text(out: Path) -> Path:
    """A text model whose head is its embeddings, and is not in the checkpoint."""
    import transformers as hf

    config = hf.Qwen3Config(
        **TEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
    )
    return _text(hf.Qwen3ForCausalLM, config, out)


def gemma3(out: Path) -> Path:
    """A text model with sliding windows, scaled embeddings and norms around every block."""
    import transformers as hf

    config = hf.Gemma3TextConfig(
        **(TEXT | {"pad_token_id": None}),
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
    )
    return _text(hf.Gemma3ForCausalLM, config, out)


def _text(model_class: Any, config: Any, out: Path) -> Path:
    tokenizer = byte_tokenizer({})
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    model_class(config).float().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_omni": build_tiny_omni,
    "qwen2_5_vl": lambda out: build_vision_language(out, "qwen2_5_vl"),
    "qwen3_vl": lambda out: build_vision_language(out, "qwen3_vl"),
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_omni_moe": qwen3_omni_moe,
    "tied": tied_text,
    "gemma3": gemma3,
}
