"""Config section of the synthetic world: how much of it, how hard, and what the cold start is
shown."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, field_validator

from avatar_rl.common.config import Section


class Category(StrEnum):
    """Question types, easy to hard."""

    COLOUR = "colour"
    PITCH = "pitch"
    SIDE = "side"
    BEEPS = "beeps"
    ORDER = "order"
    DIRECTION = "direction"
    COLOUR_AT_BEEP = "colour_at_beep"
    COUNT_ON_SIDE = "count_on_side"
    LOCALISE = "localise"
    COUNT_LEFT_OF = "count_left_of"


#: What the cold start is shown of each type: most of what teaches to see and to hear, least of what
#: is left to RL.
SFT_WEIGHTS = {
    Category.COLOUR: 0.8,
    Category.PITCH: 1.0,
    Category.SIDE: 1.2,
    Category.BEEPS: 2.0,
    Category.ORDER: 1.0,
    Category.DIRECTION: 2.0,
    Category.COLOUR_AT_BEEP: 0.4,
    Category.COUNT_ON_SIDE: 0.4,
    Category.LOCALISE: 2.0,
    Category.COUNT_LEFT_OF: 0.2,
}

#: Types that the cold start can answer but mostly does not: RL has to find out that looking pays.
GUESSED = (Category.BEEPS, Category.DIRECTION, Category.LOCALISE)


def _everywhere(value: float) -> dict[Category, float]:
    return dict.fromkeys(Category, value)


class WorldConfig(Section):
    """One synthetic world; equal configs give equal bytes."""

    seed: int = Field(0, ge=0, description="Seed of every scene, question and noise sample.")
    n_train: int = Field(
        256, ge=0, description="Prompts of train.jsonl, the pool that RL draws from."
    )
    n_heldout: int = Field(200, ge=0, description="Prompts of heldout.jsonl, for evaluation only.")
    n_sft: int = Field(
        4000, ge=0, description="Prompts with reasoning of sft.jsonl, for the cold start only."
    )
    difficulty: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Strength of pixel noise, colour shifts, hiss and detuning; 0 is clean.",
    )
    audio_in_video: bool = Field(
        False,
        description="Interleave the sound with the frames (Qwen-Omni use_audio_in_video) instead "
        "of one by one.",
    )
    weights: dict[Category, float] = Field(
        default_factory=lambda: _everywhere(1.0),
        description="Relative frequency of each question type in train.jsonl and heldout.jsonl; "
        "missing means 0.",
    )
    sft_weights: dict[Category, float] = Field(
        default_factory=lambda: dict(SFT_WEIGHTS),
        description="Relative frequency of each question type in sft.jsonl; missing means 0.",
    )
    guess_share: dict[Category, float] = Field(
        default_factory=lambda: dict.fromkeys(GUESSED, 0.65),
        description="Share of unhinted SFT targets of each question type that answer at random "
        "without looking, for RL to unlearn; missing means 0.",
    )
    hinted_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of SFT prompts marked extra.hinted, shown with their hint; their "
        "targets never guess.",
    )

    @field_validator("weights", "sft_weights")
    @classmethod
    def _weights(cls, weights: dict[Category, float]) -> dict[Category, float]:
        if any(value < 0 for value in weights.values()) or not sum(weights.values()) > 0:
            raise ValueError("weights must be >= 0 and not all 0")
        return weights

    @field_validator("guess_share")
    @classmethod
    def _shares(cls, shares: dict[Category, float]) -> dict[Category, float]:
        if any(not 0 <= value <= 1 for value in shares.values()):
            raise ValueError("shares must lie in [0, 1]")
        return shares
