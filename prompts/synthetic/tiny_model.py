"""A tiny Qwen2.5-Omni made on the spot: tokenizer, processor and random weights in the published
layout.

It is the real architecture, small enough to learn the synthetic world on one processor core. vLLM,
transformers' ``Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained`` and ``AutoProcessor``
load the folder as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avatar_rl.common.files import new_folder
from avatar_rl.prompts.synthetic.config import Category
from avatar_rl.prompts.synthetic.questions import draft

if TYPE_CHECKING:
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

    from avatar_rl.common.types import JsonObject

TAGS = ("think", "answer", "time", "caption", "thinking")
TAG_TOKENS = tuple(
    token for tag in TAGS for token in (f"<{tag}>", f"</{tag}>")
)  # plain tokens, so decoding keeps them
EOS, PAD, TURN = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
HEADS = 4  # of 32 each: vLLM's CPU attention takes no smaller ones
MEDIA_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
VOCABULARY = 512  # rows of the embedding
TOKENS = 480  # most that the tokenizer fills; the rest is padding
MEL_BINS = 32
POSITIONS = 4096

CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif part.type == 'image' -%}<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif part.type == 'video' -%}<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif part.type == 'audio' -%}<|audio_bos|><|AUDIO|><|audio_eos|>
{%- else -%}{{ raise_exception('content type ' ~ part.type ~ ' is not text, image, video or audio') }}
{%- endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def build_tiny_omni(out: Path, *, seed: int = 0) -> Path:
    """Write the model folder ``out``, whole or not at all, and return it. About 1M float32
    parameters.

    Raises DataError when ``out`` exists and is not an empty folder.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen2_5OmniThinkerForConditionalGeneration

    out = Path(out)
    with new_folder(out) as work:
        tokenizer = _tokenizer()
        config = _model_config(tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config).float()
            _initialise(model)
        weights = {
            f"thinker.{name}": value.contiguous() for name, value in model.state_dict().items()
        }
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        (work / "model.safetensors").chmod(0o644)
        config.save_pretrained(work)
        ends = [tokenizer.convert_tokens_to_ids(token) for token in (EOS, PAD)]
        GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(
            work
        )
        _processor(tokenizer).save_pretrained(work)
    return out


def _initialise(model: PreTrainedModel) -> None:
    """Weights of variance 1 / fan-in, so that signals keep their size.

    The published 0.02 suits widths in the thousands; here it makes media invisible for hundreds of
    steps."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0, 0.5)
            elif weight.dim() >= 2:
                # sound has to be heard beside the position embedding
                gain = 2.0 if "audio_tower.conv" in name else 1.0
                weight.normal_(0, gain / weight[0].numel() ** 0.5)


def _corpus() -> Iterator[str]:
    """Every word of the synthetic world, at the start of a text and inside one."""
    for category, turn in product(Category, range(24)):
        question = draft(
            category, np.random.default_rng([turn, list(Category).index(category)]), turn
        )
        lines = (
            question.question,
            *question.options,
            question.hint,
            question.reasoning(),
            question.answer,
            f"maybe {question.answer}",
            question.scene.caption(),
        )
        for line in lines:
            yield line
            yield " " + line
    for _ in range(50):
        yield from ("system", "user", "assistant", "Hint: ")


def _tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with Qwen2's rules, learnt on the synthetic world's texts."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, TURN, EOS, *MEDIA_TOKENS.values()]
    size = TOKENS - len(special) - len(TAG_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(_corpus(), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,  # type: ignore[arg-type]  # it takes the pairs as well
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens=MEDIA_TOKENS,
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAG_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def _model_config(tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    from transformers import Qwen2_5OmniConfig

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MEDIA_TOKENS.items()}
    # Frequencies are shared out t, h, w from high to low. The usual base (1e6) leaves width with
    # angles that a step of one patch hardly turns, so neighbouring columns would be the same to a
    # small model.
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    audio = {
        "num_mel_bins": MEL_BINS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "d_model": 64,
        "max_source_positions": 1500,
        "n_window": 100,
        "output_dim": 128,
    }
    thinker = {
        "text_config": text,
        "vision_config": vision,
        "audio_config": audio,
        "image_token_index": ids["image_token"],
        "audio_token_index": ids["audio_token"],
        "video_token_index": ids["video_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "user_token_id": tokenizer.convert_tokens_to_ids("user"),
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }
    config = Qwen2_5OmniConfig(
        thinker_config=thinker, talker_config=_talker_config(), enable_audio_output=False
    )
    config.architectures = ["Qwen2_5OmniModel"]
    config.dtype = "float32"
    return config


TALKER_TOKENS = (
    "text_start",
    "text_end",
    "text_pad",
    "codec_start",
    "codec_end",
    "codec_pad",
    "codec_mask",
)


def _talker_config() -> JsonObject:
    """The speech half is never built; its config has to be there and sound."""
    return {
        "vocab_size": 64,
        "embedding_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [4, 6, 6],
        },
        # the defaults lie beyond the vocabulary
        **{f"tts_{name}_token_id": 0 for name in TALKER_TOKENS},
    }


def _processor(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    bounds = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=bounds),
        video_processor=Qwen2VLVideoProcessor(size=bounds),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=MEL_BINS,
            sampling_rate=16_000,
            hop_length=160,
            n_fft=400,
            # seconds that every sound is padded to; PromptEncoder refuses longer ones
            chunk_length=4,
            return_attention_mask=True,
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
