"""The config section of LoRA. Imports neither torch nor PEFT."""

from __future__ import annotations

from pydantic import Field, field_validator

from avatar_rl.common.config import Section

#: Words for parts of a model; anything else in ``targets`` is the name of a layer.
LLM, PROJECTOR, VISION, AUDIO, ALL = "llm", "projector", "vision", "audio", "all-linear"
PARTS = (LLM, PROJECTOR, VISION, AUDIO)


class LoraConfig(Section):
    """Low-rank adapters (LoRA) on linear layers; everything else of the model is frozen."""

    rank: int = Field(16, ge=1, description="Rank of every adapter (PEFT's r).")
    alpha: float = Field(
        32.0, gt=0, description="An adapter is scaled by alpha / rank (PEFT's lora_alpha)."
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout before each adapter, in training passes only. In RL it moves the "
        "ratio between policy and sampler away from 1: keep 0 there.",
    )
    targets: tuple[str, ...] = Field(
        (LLM,),
        min_length=1,
        description="Linear layers that get an adapter: llm, projector (from tower to language "
        "model), vision, audio, all-linear (all four parts), or names of layers such as q_proj. "
        "The head gets none.",
    )
    rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."
    )

    @field_validator("targets")
    @classmethod
    def _plain(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not all(target.strip(" .") for target in targets):
            raise ValueError(f"an empty word is no target: write one of {', '.join(PARTS)}, {ALL}")
        if head := [t for t in targets if t.rpartition(".")[2] in ("lm_head", "embed_tokens")]:
            raise ValueError(
                f"{head[0]} cannot have an adapter here: leave it out (the head and the embeddings "
                "stay as they are)"
            )
        return targets

    @property
    def scaling(self) -> float:
        """The factor of every adapter's product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def encoder_targets(self) -> tuple[str, ...]:
        """Words of ``targets`` that put an adapter on a tower or its projector, so that what these
        give changes with every step. Names of layers are not known here: ask the model."""
        return tuple(t for t in self.targets if t in (PROJECTOR, VISION, AUDIO, ALL))
