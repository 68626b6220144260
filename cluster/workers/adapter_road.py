"""How a version of a LoRA run reaches the rollouts: as the adapter, or as merged weights."""

from __future__ import annotations

from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.learner.adapter.files import chosen_layers
from avatar_rl.learner.adapter.targets import encoder_layers

#: The largest rank that vLLM has room for.
MAX_RANK = 512


def adapter_road(config: RunConfig, model: Path) -> tuple[AdapterShape | None, str]:
    """The shape of the adapters that rollouts of ``model`` take; None with the reason where they
    take whole weights.

    vLLM adapts the language model. Of towers it adapts some models' and not Qwen2.5-Omni's, so an
    adapter on one is merged. Raises what ``chosen_layers`` does.
    """
    lora = config.learner.lora
    if lora is None:
        return None, "learner.lora is not set"
    if config.rollout.lora == "merged":
        return None, "rollout.lora is merged"
    if lora.rank > MAX_RANK:
        return None, f"learner.lora.rank is {lora.rank}, and vLLM takes ranks up to {MAX_RANK}"
    if encoders := encoder_layers(chosen_layers(model, lora)):
        return None, (
            f"learner.lora adapts {len(encoders)} layers of towers or projectors, first "
            f"{encoders[0]}, and vLLM those of the language model alone"
        )
    return AdapterShape(lora.rank, lora.alpha, lora.rslora), ""
