"""How a version of a LoRA run reaches the rollouts: as the adapter, or as merged weights."""

from __future__ import annotations

import json
from pathlib import Path

from avatar_rl.actors.vllm_models import takes_adapters
from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.learner.adapter.files import chosen_layers
from avatar_rl.learner.adapter.targets import encoder_layers

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
    if config.rollout.lora == "merged":
        return None, "rollout.lora is merged"
    if lora.rank > MAX_RANK:
        return None, f"learner.lora.rank is {lora.rank}, and vLLM takes ranks up to {MAX_RANK}"
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


def road_words(config: RunConfig, model: Path | None) -> str:
    """What rollouts take of a version, with the reason where that is not the adapter itself; empty
    without one. ``model``: the checkpoint, None where it is not here; then by the recipe's words.

    Raises what ``adapter_road`` does.
    """
    lora = config.learner.lora
    if lora is None:
        return ""
    if model is not None:
        why = adapter_road(config, model)[1]
        return f"merged weights: {why}" if why else "the adapter"
    if config.rollout.lora == "merged":
        return "merged weights: rollout.lora is merged"
    if encoders := lora.encoder_targets:
        return (
            f"merged weights: vLLM adapts no towers or projectors, and targets name {encoders[0]}"
        )
    return "the adapter; its layers are checked where the model is"
