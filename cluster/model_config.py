"""The config section of the model that is trained."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from avatar_rl.common.config import Section, expanded


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
