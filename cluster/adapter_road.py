"""How a version of a LoRA run reaches the rollouts: as the adapter, or as merged weights."""

from __future__ import annotations

import json
from pathlib import Path

from avatar_rl.actors.vllm_models import takes_adapters
from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.common.errors import AvatarError
from avatar_rl.learner.adapter.files import chosen_layers
from avatar_rl.learner.adapter.targets import encoder_layers
from avatar_rl.learner.lora_config import LoraConfig

#: The largest rank that vLLM has room for.
MAX_RANK = 512


def adapter_road(config: RunConfig, model: Path) -> tuple[AdapterShape | None, str]:
    """The shape of the adapters that rollouts of ``model`` take; None with the reason where they
    take whole weights.

    vLLM adapts the language model of most models. Of towers it adapts some models' and not
    Qwen2.5-Omni's, so an adapter on one is merged. Raises what ``chosen_layers`` does.
    """
    lora = config.learner.lora
    if lora is None:
        return None, "learner.lora is not set"
    if why := _said_by_recipe(config, lora):
        return None, why
    layers = chosen_layers(model, lora)
    if encoders := encoder_layers(layers):
        return None, (
            f"learner.lora adapts {len(encoders)} layers of towers or projectors, first "
            f"{encoders[0]}, and vLLM those of the language model alone"
        )
    named = json.loads((model / "config.json").read_text()).get("architectures") or [""]
    if not takes_adapters(named[0]):
        return None, f"the installed vLLM takes no adapters for {named[0]}"
    words = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    return AdapterShape(lora.rank, lora.alpha, lora.rslora, words), ""


def takes_adapter(config: RunConfig, model: Path | None) -> bool:
    """Whether rollouts take the adapter itself: what ``adapter_road`` decides of the checkpoint
    ``model``; where there is none, or none that can be read, what the recipe's words say."""
    lora = config.learner.lora
    if lora is None:
        return False
    try:
        return not _why_merged(config, lora, model)
    except (AvatarError, OSError, ValueError):  # the model's own finding says it
        return not _why_merged(config, lora, None)


def road_words(config: RunConfig, model: Path | None) -> str:
    """What rollouts take of a version, with the reason where that is not the adapter itself; empty
    without one. ``model``: the checkpoint, None where it is not here; then by the recipe's words.

    Raises what ``adapter_road`` does.
    """
    lora = config.learner.lora
    if lora is None:
        return ""
    if why := _why_merged(config, lora, model):
        return f"merged weights: {why}"
    return "the adapter" if model else "the adapter; its layers are checked where the model is"


def _why_merged(config: RunConfig, lora: LoraConfig, model: Path | None) -> str:
    """Why an adapter does not travel by itself; empty where it does."""
    if model is not None:
        return adapter_road(config, model)[1]
    if why := _said_by_recipe(config, lora):
        return why
    if encoders := lora.encoder_targets:
        return f"vLLM adapts no towers or projectors, and targets name {encoders[0]}"
    return ""


def _said_by_recipe(config: RunConfig, lora: LoraConfig) -> str:
    """Why it is merged whatever the model; empty where that depends on the model."""
    if config.rollout.lora == "merged":
        return "rollout.lora is merged"
    if lora.rank > MAX_RANK:
        return f"learner.lora.rank is {lora.rank}, and vLLM takes ranks up to {MAX_RANK}"
    return ""
