"""Whether rollouts may take the learner's stored embeddings of media."""

from __future__ import annotations

import json
from pathlib import Path

from avatar_rl.actors.spec import StoreSpec
from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.errors import ConfigError
from avatar_rl.learner.adapter.files import chosen_layers
from avatar_rl.learner.adapter.targets import encoder_layers
from avatar_rl.prompts.embeddings.names import TOWERS


def store_spec(config: RunConfig, model: Path, *, on_gpu: bool) -> StoreSpec | None:
    """The store that rollouts of ``model`` open; None where the recipe does not ask for it.

    Raises ConfigError where it asks and an embedding would not be the model's, or nobody stores
    any.
    """
    if not config.rollout.stored_embeddings:
        return None
    learner = config.learner
    dtype = learner.optimizer.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    engine = config.rollout.engine.dtype_on("cuda" if on_gpu else "cpu")
    if why := _hindrance(config, model, dtype, engine):
        raise ConfigError(
            f"rollout.stored_embeddings is true, but {why}, or set stored_embeddings to false"
        )
    return StoreSpec(learner.embeddings.folder, learner.embeddings.bytes, dtype)


def _hindrance(config: RunConfig, model: Path, dtype: str, engine: str) -> str:
    """What hinders it and the remedy; empty where nothing does."""
    from avatar_rl.prompts.encoding.rope import MULTIMODAL, OMNI  # torch: not with every driver

    learner = config.learner
    kind = str(json.loads((model / "config.json").read_text()).get("model_type", ""))
    if kind not in MULTIMODAL:
        return f"model type {kind!r} has no vision or audio tower: take another model"
    if learner.embeddings.mode in ("off", "pixels"):
        return (
            f"learner.embeddings.mode is {learner.embeddings.mode}, which stores none: set it to "
            "auto or on"
        )
    if dtype != engine:
        return (
            f"the learner's embeddings are {dtype} and the engine computes in {engine}: set "
            f"rollout.engine.dtype to {dtype}"
        )
    if learner.lora is not None:
        adapted = encoder_layers(chosen_layers(model, learner.lora))
        if adapted:
            return (
                f"learner.lora adapts {len(adapted)} layers of towers or projectors, first "
                f"{adapted[0]}: leave them out of learner.lora.targets"
            )
        return ""
    towers = TOWERS if kind in OMNI else TOWERS[:1]
    if trained := [tower for tower in towers if tower not in learner.optimizer.freeze]:
        words = " and ".join(trained)
        return f"the towers train: {words}: add {words} to learner.optimizer.freeze"
    return ""
