"""Which linear layers get an adapter: words for parts of a model, and names of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from avatar_rl.common.errors import ConfigError
from avatar_rl.learner.lora_config import ALL, AUDIO, LLM, PARTS, PROJECTOR, VISION, LoraConfig

#: Words of a dotted name that place a layer, asked in this order; everything else is the language
#: model's.
_PROJECTORS = frozenset(
    {"merger", "merger_list", "deepstack_merger_list", "multi_modal_projector", "mm_projector"}
)
_VISION = frozenset({"visual", "vision_tower", "vision_model", "vision_encoder"})
_AUDIO = frozenset({"audio_tower", "audio_model", "audio_encoder"})
#: Never adapted: heads, tables, and parts that are neither trained nor served.
_LEFT_OUT = frozenset(
    {"lm_head", "embed_tokens", "embed_positions", "pos_embed", "talker", "token2wav", "code2wav"}
)
#: Nor these of a mixture of experts: transformers holds the routed experts of a layer as one
#: tensor and its router as another, whatever a checkpoint has.
_ROUTED, _ROUTER = "experts", ["mlp", "gate"]

#: (outputs, inputs) of a linear layer by its dotted name.
Shapes = Mapping[str, tuple[int, int]]


def part_of(name: str) -> str | None:
    """The part of a model that the layer ``name`` belongs to; None for one that gets no adapter."""
    words = name.split(".")
    if not _LEFT_OUT.isdisjoint(words) or _ROUTED in words or words[-2:] == _ROUTER:
        return None
    if not _PROJECTORS.isdisjoint(words) or words[-2:] == ["audio_tower", "proj"]:
        return PROJECTOR
    if not _VISION.isdisjoint(words):
        return VISION
    return AUDIO if not _AUDIO.isdisjoint(words) else LLM


def matching(names: Iterable[str], target: str) -> list[str]:
    """Those of the layers ``names`` that a word of ``targets`` means."""
    return [
        name
        for name in names
        if (part := part_of(name)) is not None and _matches(name, part, target)
    ]


def choose(layers: Shapes, config: LoraConfig, *, key: str = "learner.lora") -> list[str]:
    """Names of the linear layers that get an adapter, in the order of ``layers``.

    Raises ConfigError for a target that matches nothing, listing what there is, and for a rank
    above the smaller width of a chosen layer: it would add nothing to that layer.
    """
    parts = {name: part for name in layers if (part := part_of(name)) is not None}
    chosen: set[str] = set()
    for target in config.targets:
        found = matching(parts, target)
        if not found:
            raise ConfigError(
                f"{key}.targets: {target!r} matches no linear layer of the model; there are "
                f"{_what_there_is(parts)}"
            )
        chosen.update(found)
    narrow = [name for name in layers if name in chosen and min(layers[name]) < config.rank]
    if narrow:
        least = min(narrow, key=lambda name: min(layers[name]))
        raise ConfigError(
            f"{key}.rank {config.rank} is above the width of {len(narrow)} layer(s), least "
            f"{least} with {min(layers[least])}: lower the rank to {min(layers[least])}, or leave "
            "these layers out of targets"
        )
    return [name for name in layers if name in chosen]


def encoder_layers(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that lie in a tower or its projector: with an adapter there, what a medium
    becomes changes with every step, and no stored embedding can stand for it."""
    return [name for name in names if part_of(name) not in (LLM, None)]


def _matches(name: str, part: str, target: str) -> bool:
    if target in (*PARTS, ALL):
        return target in (part, ALL)
    return name == target or name.endswith("." + target)


def _what_there_is(parts: Mapping[str, str]) -> str:
    """The parts with their numbers of layers, and the last words of the layers' names."""
    sizes = Counter(parts.values())
    counts = ", ".join(f"{part} ({sizes[part]})" for part in PARTS if sizes[part])
    words: Sequence[str] = sorted({name.rpartition(".")[2] for name in parts})
    return f"the parts {counts or 'none'} and layers named {', '.join(words[:40]) or 'nothing'}"
