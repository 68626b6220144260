"""Sizes of models: the published architectures, and those of a model folder by its own files.

Parameters are those of the part that is trained and served (an omni model's thinker; talker and
vocoder are left out), counted from the published ``config.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from avatar_rl.common.types import JsonObject
from avatar_rl.learner.adapter.targets import AUDIO, LLM, VISION, matching, part_of

#: (outputs, inputs) of linear layers by their dotted names.
Linear = Mapping[str, tuple[int, int]]
#: Words of learner.optimizer.freeze that freeze a model's towers.
SIGHT, SOUND = "visual", "audio_tower"


@dataclass(frozen=True)
class Tower:
    """A vision or audio tower with its projector. Widths in features."""

    word: str  # of its parameters' names: SIGHT or SOUND
    parameters: float
    layers: int
    hidden: int
    mlp: int
    positions: float  # of its layers, for one position of the decoder
    inputs: int  # numbers of the medium that become one position of its layers
    linear: Linear = field(repr=False, default_factory=dict)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two branches."""
        return any(name.endswith("gate_proj") for name in self.linear)

    def numbers(self) -> float:
        """What a layer's backward pass needs of the forward, numbers of a position: two normed
        inputs before and after their weights, queries, keys and values, the first two also after
        rotation, the attention's result by window and together, and the products of the MLP."""
        return 12 * self.hidden + (4 if self.gated else 2) * self.mlp


@dataclass(frozen=True)
class Architecture:
    """A decoder and its towers. Widths in features; ``experts`` 1 means a dense MLP of width
    ``mlp``."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    queries: int  # heads x head size
    keys: int  # key-value heads x head size
    mlp: int
    towers: tuple[Tower, ...] = ()
    experts: int = 1
    active_experts: int = 1  # of a token
    tied: bool = False

    @property
    def encoders(self) -> float:
        """Parameters of vision and audio towers."""
        return sum(tower.parameters for tower in self.towers)

    @property
    def hears(self) -> bool:
        """Whether it has an audio tower."""
        return any(tower.word == SOUND for tower in self.towers)

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

    @cached_property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers that an adapter may lie on; a router and fused experts are none."""
        own = {"q_proj": (self.queries, self.hidden), "o_proj": (self.hidden, self.queries)}
        own |= {name: (self.keys, self.hidden) for name in ("k_proj", "v_proj")}
        layer = {f"self_attn.{name}": shape for name, shape in own.items()}
        if self.experts == 1:
            layer |= {f"mlp.{name}": (self.mlp, self.hidden) for name in ("gate_proj", "up_proj")}
            layer["mlp.down_proj"] = (self.hidden, self.mlp)
        found = _repeated("language_model.layers", self.layers, layer)
        for tower in self.towers:
            found |= tower.linear
        return found

    def adapted(self, targets: Iterable[str]) -> list[str]:
        """Names of the layers that LoRA's ``targets`` mean; of what matches nothing none."""
        return sorted({name for target in targets for name in matching(self.linear, target)})

    def adapter(self, rank: int, targets: Iterable[str] = (LLM,)) -> int:
        """Parameters of LoRA on these layers: A (rank, inputs) and B (outputs, rank) each."""
        return rank * sum(sum(self.linear[name]) for name in self.adapted(targets))


def _repeated(prefix: str, count: int, layer: Linear) -> dict[str, tuple[int, int]]:
    return {
        f"{prefix}.{number}.{name}": shape
        for number in range(count)
        for name, shape in layer.items()
    }


def vision_tower(
    depth: int,
    hidden: int,
    mlp: int,
    out: int,
    *,
    patch: int,
    split: bool = False,
    gated: bool = True,
    mergers: Sequence[str] = ("merger.mlp.0", "merger.mlp.2"),
    tables: int = 0,
) -> Tower:
    """A published tower of the Qwen family: ``depth`` blocks over patches of 2 x side x side x 3 =
    ``patch`` numbers, and mergers of 2 x 2 positions.

    ``split``: queries, keys and values are three layers. ``mergers`` are pairs of linear layers.
    ``tables`` are parameters of learned positions.
    """
    joint = {"attn.qkv": (3 * hidden, hidden)}
    block = {f"attn.{name}": (hidden, hidden) for name in "qkv"} if split else joint
    block["attn.proj"] = (hidden, hidden)
    if gated:
        block |= {f"mlp.{name}": (mlp, hidden) for name in ("gate_proj", "up_proj")}
        block["mlp.down_proj"] = (hidden, mlp)
    else:
        block |= {"mlp.linear_fc1": (mlp, hidden), "mlp.linear_fc2": (hidden, mlp)}
    merged = 4 * hidden
    linear = _repeated("visual.blocks", depth, block)
    for number, name in enumerate(mergers):
        linear[f"visual.{name}"] = (out if number % 2 else merged, merged)
    size = sum(a * b for a, b in linear.values()) + patch * hidden + tables
    return Tower(SIGHT, size, depth, hidden, mlp, 4, patch, linear)


def audio_tower(
    layers: int, hidden: int, mlp: int, out: int, *, mels: int, published: float | None = None
) -> Tower:
    """Whisper's encoder with a projector: two convolutions of width 3, the second of which halves
    the frames; two positions of a layer become one of the decoder.

    ``published``: the size of a tower of another kind, which has eight times fewer frames and two
    projecting layers.
    """
    layer = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    layer |= {"fc1": (mlp, hidden), "fc2": (hidden, mlp)}
    linear = _repeated("audio_tower.layers", layers, layer)
    if published is not None:
        linear |= {"audio_tower.proj1": (hidden, hidden), "audio_tower.proj2": (out, hidden)}
        linear["audio_tower.conv_out"] = (hidden, 480 * mels // 8)
        return Tower(SOUND, published, layers, hidden, mlp, 1, 8 * mels, linear)
    linear["audio_tower.proj"] = (out, hidden)
    size = sum(a * b for a, b in linear.values()) + 3 * hidden * (mels + hidden)
    return Tower(SOUND, size, layers, hidden, mlp, 2, 2 * mels, linear)


def _sight_2_5(out: int, *, split: bool = False) -> Tower:
    return vision_tower(32, 1280, 3420, out, patch=1176, split=split)


#: Four mergers, three of them for the decoder's first layers.
_DEEP_VL = tuple(
    f"{name}.linear_fc{number}"
    for name in ("merger", *(f"deepstack_merger_list.{i}" for i in range(3)))
    for number in (1, 2)
)
_DEEP_OMNI = tuple(
    f"{name}.mlp.{number}"
    for name in ("merger", *(f"merger_list.{i}" for i in range(3)))
    for number in (0, 2)
)


def _sight_3(out: int, mergers: Sequence[str] = _DEEP_VL) -> Tower:
    return vision_tower(
        27, 1152, 4304, out, patch=1536, gated=False, mergers=mergers, tables=2304 * 1152
    )


ARCHITECTURES = (
    Architecture(
        "Qwen2.5-Omni-3B",
        151_936,
        2048,
        36,
        2048,
        256,
        11_008,
        (_sight_2_5(2048, split=True), audio_tower(32, 1280, 5120, 2048, mels=128)),
    ),
    Architecture(
        "Qwen2.5-Omni-7B",
        152_064,
        3584,
        28,
        3584,
        512,
        18_944,
        (_sight_2_5(3584, split=True), audio_tower(32, 1280, 5120, 3584, mels=128)),
    ),
    Architecture("Qwen2.5-VL-7B", 152_064, 3584, 28, 3584, 512, 18_944, (_sight_2_5(3584),)),
    Architecture("Qwen3-VL-8B", 151_936, 4096, 36, 4096, 1024, 12_288, (_sight_3(4096),)),
    Architecture(
        "Qwen3-VL-30B-A3B",
        151_936,
        2048,
        48,
        4096,
        512,
        768,
        (_sight_3(2048),),
        experts=128,
        active_experts=8,
    ),
    Architecture("Qwen3-8B", 151_936, 4096, 36, 4096, 1024, 12_288),
    Architecture(
        "Qwen3-Omni-30B-A3B",
        152_064,
        2048,
        48,
        4096,
        512,
        768,
        (
            _sight_3(2048, _DEEP_OMNI),
            audio_tower(32, 1280, 5120, 2048, mels=128, published=0.65e9),  # rounded
        ),
        experts=128,
        active_experts=8,
    ),
)


#: Parts of an omni model that are neither trained nor served.
_LEFT_OUT = ("talker", "token2wav", "code2wav")
#: Words of a tower's names by the part that LoRA calls it.
_ENCODERS = {VISION: ("visual", "vision_tower", "vision_model"), AUDIO: ("audio_tower",)}
#: Matrices that are tables and no layers.
_TABLES = frozenset({"audio_bos_eos_token", "position_embedding", "position_embeddings"})


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
        _towers(folder, _outer(config)),
        experts=experts,
        active_experts=_number(text, "num_experts_per_tok", default=1),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
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


def _towers(folder: Path, config: JsonObject) -> tuple[Tower, ...]:
    """By the headers of the weight files, and the sections of the towers. Without weights their
    layers are not known: parameters count as none."""
    tensors = dict(_shapes(folder))
    found = []
    for part, words in _ENCODERS.items():
        shapes = {
            name: shape
            for name, shape in tensors.items()
            if (own := set(name.split("."))).isdisjoint(_LEFT_OUT) and not own.isdisjoint(words)
        }
        section = config.get("vision_config" if part == VISION else "audio_config")
        if not shapes and section is None:
            continue
        numbers: JsonObject = section if isinstance(section, dict) else {}
        linear = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in shapes.items()
            if len(shape) == 2
            and name.endswith(".weight")
            and _TABLES.isdisjoint(name.split("."))
            and part_of(name.removesuffix(".weight")) is not None
        }
        found.append(
            Tower(
                SIGHT if part == VISION else SOUND,
                float(sum(math.prod(shape) for shape in shapes.values())),
                _number(numbers, "depth", "encoder_layers", "num_hidden_layers", default=0),
                _number(numbers, "embed_dim", "d_model", "hidden_size", default=0),
                _number(numbers, "encoder_ffn_dim", "intermediate_size", default=0),
                *_positions(part, numbers, linear),
                linear,
            )
        )
    return tuple(found)


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Of each tensor, by the headers of the weight files. Raises ValueError for what is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"{file} is no weight file")
            header: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
        for name, entry in header.items():
            if "shape" in entry:
                yield name, entry["shape"]


def _positions(part: str, section: JsonObject, linear: Linear) -> tuple[float, int]:
    """Positions of a tower's layers for one of the decoder, and the numbers that become one."""
    if part == VISION:
        merged = _number(section, "spatial_merge_size", default=2)
        side = _number(section, "patch_size", default=14)
        frames = _number(section, "temporal_patch_size", default=1)
        return float(merged**2), 3 * frames * side**2
    mels = _number(section, "num_mel_bins", default=128)
    return (1.0, 8 * mels) if any("conv_out" in name for name in linear) else (2.0, 2 * mels)
