"""The config section of the model that is trained, and what does not go with its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field, field_validator

from avatar_rl.actors.vllm_arguments import OF_ADAPTERS
from avatar_rl.common.config import Section, expanded
from avatar_rl.learner.lora_config import LoraConfig


class ModelSection(Section):
    """Which policy is trained."""

    path: str = Field(
        "tiny",
        description="Hugging Face checkpoint folder, a folder with a LoRA adapter (PEFT), or "
        "'tiny' to build the toy Qwen2.5-Omni.",
    )
    base: Path | None = Field(
        None,
        description="Checkpoint folder that the adapter in path was trained on; null takes the one "
        "that it names.",
    )
    reference: Path | None = Field(
        None,
        description="Checkpoint of the KL reference policy; null takes the weights the run starts "
        "from.",
    )

    @field_validator("path")
    @classmethod
    def _expand(cls, path: str) -> str:
        return str(expanded(path))


def adapter_faults(lora: LoraConfig | None, road: str, vllm: Mapping[str, object]) -> Iterator[str]:
    """Keys of adapters in a run whose rollouts take none. ``road`` is ``rollout.lora``, ``vllm``
    the engine's arguments."""
    if lora is None and road == "merged":
        yield (
            "rollout.lora merged says how rollouts take an adapter, and learner.lora is not set, "
            "so that nothing reads it: set learner.lora, or leave rollout.lora out"
        )
    if lora is None or road == "merged":
        why = "learner.lora is not set" if lora is None else "rollout.lora is merged"
        for name in sorted(OF_ADAPTERS & vllm.keys()):
            yield (
                f"rollout.engine.vllm.{name} is for adapters, and rollouts take whole weights "
                f"({why}): leave it out"
            )
