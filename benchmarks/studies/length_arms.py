"""The length study's protocol: question types, cold starts, lengths, arms and seeds. Fixed before
the report's seeds are run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from avatar_rl.cluster.recipe.overlays import Overlay, merge
from avatar_rl.prompts.synthetic.config import Category, WorldConfig
from benchmarks.studies.arms import rate
from benchmarks.studies.length_notes import PASSES
from benchmarks.studies.runs import Arm

#: Types that need the sound, so that a plan without it is wrong; three need the picture, too.
TYPES = (Category.BEEPS, Category.COLOUR_AT_BEEP, Category.COUNT_ON_SIDE, Category.LOCALISE)
POOL, HELDOUT = 48, 96
WORLD = WorldConfig(
    n_train=POOL,
    n_heldout=HELDOUT,
    n_sft=1600,
    weights=dict.fromkeys(TYPES, 1.0),
    sft_weights=dict.fromkeys(TYPES, 1.0),
    guess_share={},
    hinted_share=0.0,
)
#: Share of the cold start's targets that are right in plan, notes and conclusion.
HONEST = 0.3
#: The demo's own cold start sees and hears already; it is taught the lengths on top.
BEFORE = "recipes/assets/tiny_omni"
COLD_START: Overlay = {
    "steps": 240,
    "batch_size": 24,
    "ranks": 2,
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.01},
}
RECIPE: Overlay = {
    "data": {"template": {"max_prompt_tokens": 256}},
    "rollout": {
        "workers": 1,
        "max_sequences": 64,
        "engine": {
            "max_num_seqs": 64,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": 128 << 20,
        },
    },
    "rewards": {"weights": {"format": 0.5, "accuracy": 0.5}, "numeric": "exact"},
    "learner": {
        # without it a shape that weighs more in all would be a higher rate as well
        "objective": {"beta": 0.02, "tas_normalize": "unit_mean"},
        "optimizer": {"freeze": ["visual", "audio_tower"]},
    },
    "loop": {"prompts_per_step": 8},
}
#: Most tokens of a completion: half as many again as the longest target.
MOST_TOKENS = {"short": 72, "medium": 200, "long": 544}
LR = 4e-4
#: Completions of every run; none stops earlier, so that all are compared over the same stretch.
COMPLETIONS = 640
#: Completions between two measurements, and those of each prompt at one. They are not charged.
MEASURE, SAMPLES = 128, 2
SEEDS = (0, 1, 2, 3, 4)

UNIFORM = "uniform"
#: Weight over the position in the completion (docs/method.md 1.2) and its strength lambda. The
#: paper's is the first.
SHAPES: dict[str, tuple[str, float]] = {
    "parabolic 0.3": ("parabolic", 0.3),
    UNIFORM: ("parabolic", 0.0),
    "inverse 0.3": ("inverse_parabolic", 0.3),
    "parabolic 1": ("parabolic", 1.0),
    "decay 0.3": ("linear_decay", 0.3),
    "incline 0.3": ("linear_incline", 0.3),
    "parabolic 0.1": ("parabolic", 0.1),
}


@dataclass(frozen=True)
class Cell:
    """One shape at one length."""

    length: str
    shape: str

    @property
    def arm(self) -> Arm:
        """GRPO with the advantages of a completion's tokens shaped by their position."""
        shape, strength = SHAPES[self.shape]
        most = MOST_TOKENS[self.length]
        return Arm(
            "tas_only",
            merge(
                rate(LR),
                {
                    "learner": {"objective": {"tas_shape": shape, "tas_lambda": strength}},
                    "rollout": {
                        "sampling": {"max_tokens": most},
                        "engine": {"max_model_len": 256 + most},
                    },
                },
            ),
        )


#: Most important first, and every length of a shape before the next shape.
CELLS: dict[str, Cell] = {
    f"{length}, {shape}": Cell(length, shape) for shape in SHAPES for length in PASSES
}
SMOKE_CELL = f"short, {UNIFORM}"
SMOKE_START: Overlay = COLD_START | {"steps": 2, "ranks": 1}
SMOKE_WORLD = WORLD.model_copy(update={"n_train": 4, "n_heldout": 4, "n_sft": 32})


def ground_of(length: str, start: Overlay = COLD_START) -> Overlay:
    """What stands for the files of a run in its digest."""
    return {
        "world": WORLD.model_dump(mode="json"),
        "reasoning": [length, *PASSES[length], HONEST],
        "before": BEFORE,
        "start": start,
    }


def protocol() -> str:
    """Digest of all that has to be the same in every run of the study, whatever its arm."""
    fixed = [[ground_of(length) for length in PASSES], RECIPE, MOST_TOKENS, LR, COMPLETIONS]
    rest = [MEASURE, SAMPLES]
    return hashlib.sha256(json.dumps([*fixed, rest], sort_keys=True).encode()).hexdigest()[:12]
