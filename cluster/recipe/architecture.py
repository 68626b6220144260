"""Sizes of models: the published architectures, and those of a model folder by its own files.

Parameters are those of the part that is trained and served (an omni model's thinker; talker and
vocoder are left out), counted from the published ``config.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avatar_rl.common.types import JsonObject


@dataclass(frozen=True)
class Architecture:
    """A decoder and its encoders. Widths in features; ``experts`` 1 means a dense MLP of width
    ``mlp``."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    queries: int  # heads x head size
    keys: int  # key-value heads x head size
    mlp: int
    encoders: float  # parameters of vision and audio towers
    experts: int = 1
    active_experts: int = 1  # of a token
    tied: bool = False
    hears: bool = False  # has an audio tower

    @property
    def layer(self) -> int:
        """Parameters of one layer, biases and norms (below 0.1 %) left out."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + router + self.experts * 3 * self.hidden * self.mlp

    @property
    def decoder(self) -> int:
        """Parameters of the language model."""
        table = self.vocabulary * self.hidden
        return self.layers * self.layer + table * (1 if self.tied else 2)

    @property
    def largest_part(self) -> int:
        """Parameters that are gathered at once when a version is published."""
        return max(self.layer, self.vocabulary * self.hidden)

    @property
    def parameters(self) -> float:
        return self.decoder + self.encoders

    def train_flops(
        self, positions: float, scored: float, pairs: float, *, frozen: bool = False
    ) -> float:
        """Floating-point operations of the decoder's forward and backward pass.

        A product of a position and a matrix of n parameters is 2 n operations, forward. Backward
        is twice that: once for the input's gradient, once for the weights'. ``frozen`` weights (an
        adapter trains beside them) need the first only. ``scored`` positions go through the head,
        ``pairs`` of them through attention: 2 for the score, 2 for the sum, per query feature.
        What checkpointing computes again does not count, nor do the towers.
        """
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        router = self.hidden * self.experts if self.experts > 1 else 0
        layer = attention + router + self.active_experts * 3 * self.hidden * self.mlp
        linear = self.layers * layer * positions + self.vocabulary * self.hidden * scored
        scores = 2 * self.layers * self.queries * pairs
        return 2 * linear * (2 if frozen else 3) + 2 * scores * 3

    def cache_bytes(self, tokens: int, number: int = 2) -> int:
        """Keys and values of ``tokens`` tokens, ``number`` bytes each (bfloat16)."""
        return tokens * self.layers * 2 * self.keys * number

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer of the decoder; a router and fused experts have
        none."""
        widths = [self.hidden + self.queries] * 2 + [self.hidden + self.keys] * 2
        if self.experts == 1:
            widths += [self.hidden + self.mlp] * 3
        return self.layers * rank * sum(widths)


def _vision(depth: int, hidden: int, mlp_matrices: float, out: int) -> float:
    """Blocks, patch embedding of 2 x 14 x 14 x 3, and the 2 x 2 merger."""
    merged = 4 * hidden
    return depth * (4 * hidden**2 + mlp_matrices) + 1176 * hidden + merged * (merged + out)


VISION_2_5 = {"depth": 32, "hidden": 1280, "mlp_matrices": 3 * 1280 * 3420}


def _vision_3(out: int) -> float:
    """Blocks, patch embedding of 2 x 16 x 16 x 3, positions, and four 2 x 2 mergers, three of them
    for the decoder's first layers."""
    hidden, merged = 1152, 4 * 1152
    blocks = 27 * (4 * hidden**2 + 2 * hidden * 4304)
    return blocks + 1536 * hidden + 2304 * hidden + 4 * merged * (merged + out)


AUDIO = 32 * (4 * 1280**2 + 2 * 1280 * 5120) + 3 * 1280 * (128 + 1280)  # Whisper large's encoder

ARCHITECTURES = (
    Architecture(
        "Qwen2.5-Omni-3B",
        151_936,
        2048,
        36,
        2048,
        256,
        11_008,
        _vision(**VISION_2_5, out=2048) + AUDIO + 1280 * 2048,
        hears=True,
    ),
    Architecture(
        "Qwen2.5-Omni-7B",
        152_064,
        3584,
        28,
        3584,
        512,
        18_944,
        _vision(**VISION_2_5, out=3584) + AUDIO + 1280 * 3584,
        hears=True,
    ),
    Architecture(
        "Qwen2.5-VL-7B", 152_064, 3584, 28, 3584, 512, 18_944, _vision(**VISION_2_5, out=3584)
    ),
    Architecture("Qwen3-VL-8B", 151_936, 4096, 36, 4096, 1024, 12_288, _vision_3(out=4096)),
    Architecture(
        "Qwen3-VL-30B-A3B",
        151_936,
        2048,
        48,
        4096,
        512,
        768,
        _vision_3(out=2048),
        experts=128,
        active_experts=8,
    ),
    Architecture("Qwen3-8B", 151_936, 4096, 36, 4096, 1024, 12_288, 0.0),
    Architecture(
        "Qwen3-Omni-30B-A3B",
        152_064,
        2048,
        48,
        4096,
        512,
        768,
        0.54e9 + 0.65e9,
        experts=128,
        active_experts=8,
        hears=True,
    ),  # towers as published, rounded
)


#: Parts of an omni model that are neither trained nor served.
_LEFT_OUT = ("talker", "token2wav", "code2wav")
_ENCODERS = frozenset({"visual", "vision_tower", "audio_tower", "vision_model"})


def architecture_of(path: str) -> Architecture | None:
    """The plan of a recipe's ``model.path``: by its config.json, else, where the folder is not on
    this machine, by the name of a published model. None for others, and for 'tiny'."""
    folder = Path(path)
    try:
        config: JsonObject = json.loads((folder / "config.json").read_bytes())
        return _of_config(folder, config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ZeroDivisionError):
        name = folder.name.lower()
        return next((item for item in ARCHITECTURES if item.name.lower() in name), None)


def _of_config(folder: Path, config: JsonObject) -> Architecture:
    """Raises KeyError for a config.json of another form."""
    text = decoder_of(config)
    heads = _number(text, "num_attention_heads")
    hidden = _number(text, "hidden_size")
    size = _number(text, "head_dim", default=hidden // heads)
    experts = _number(text, "num_experts", "num_local_experts", default=1)
    mlp = _number(text, "intermediate_size", default=hidden)
    return Architecture(
        folder.name,
        _number(text, "vocab_size"),
        hidden,
        _number(text, "num_hidden_layers"),
        heads * size,
        _number(text, "num_key_value_heads", default=heads) * size,
        _number(text, "moe_intermediate_size", default=mlp) if experts > 1 else mlp,
        float(sum(_encoder_sizes(folder))),
        experts=experts,
        active_experts=_number(text, "num_experts_per_tok", default=1),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        hears="audio_config" in _outer(config),
    )


def heads_of(path: Path) -> int | None:
    """Attention heads of the language model in a folder; None where its config tells of none."""
    config: JsonObject = json.loads((path / "config.json").read_bytes())
    heads = decoder_of(config).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _number(section: JsonObject, *names: str, default: int | None = None) -> int:
    """The first of the keys that is a number. Raises KeyError where none is, without a default."""
    for name in names:
        if isinstance(value := section.get(name), int):
            return value
    if default is None:
        raise KeyError(names[0])
    return default


def decoder_of(config: JsonObject) -> JsonObject:
    """The section of the language model, at whatever depth."""
    for name in ("thinker_config", "text_config", "llm_config"):
        if isinstance(inner := config.get(name), dict):
            return decoder_of(inner)
    return config


def _outer(config: JsonObject) -> JsonObject:
    """The section that holds those of the towers."""
    thinker = config.get("thinker_config")
    return thinker if isinstance(thinker, dict) else config


def _encoder_sizes(folder: Path) -> Iterator[int]:
    """Parameters of each tensor of a tower, by the headers of the weight files."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"{file} is no weight file")
            header: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
        for name, entry in header.items():
            parts = name.split(".")
            if parts[0] not in _LEFT_OUT and not _ENCODERS.isdisjoint(parts):
                yield math.prod(entry["shape"])
