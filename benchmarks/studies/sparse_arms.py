"""The sparse study's protocol: pool, cold start, targets, cap, arms and seeds. Fixed before the
report's seeds are run; rates and settings were chosen on the tuning seeds only."""

from __future__ import annotations

from avatar_rl.cluster.recipe.overlays import Overlay
from avatar_rl.prompts.synthetic.config import Category, WorldConfig
from benchmarks.studies.habits import Habits

#: Four skills: seeing where, seeing motion, counting sounds, and both senses together. A success
#: of one says little about the others.
HABITS = Habits(
    {
        Category.LOCALISE: "Left: low / Right: high",
        Category.BEEPS: "3",
        Category.SIDE: "B",
        Category.DIRECTION: "B",
    },
    look_share=0.04,
)
POOL, HELDOUT = 48, 96
WORLD = WorldConfig(
    n_train=240,
    n_heldout=320,
    n_sft=4800,
    weights=dict.fromkeys(HABITS.answers, 1.0),
    guess_share={},
    hinted_share=0.0,
    sft_weights={
        Category.COLOUR: 0.4,
        Category.PITCH: 0.7,
        Category.ORDER: 0.5,
        Category.BEEPS: 2.0,
        Category.SIDE: 2.0,
        Category.DIRECTION: 2.0,
        Category.LOCALISE: 4.0,
    },
)
COLD_START: Overlay = {
    "steps": 1000,
    "batch_size": 32,
    "ranks": 2,
    "optimizer": {"lr": 1.5e-3, "betas": [0.9, 0.95], "weight_decay": 0.01},
}
#: What all runs have in common.
RECIPE: Overlay = {
    "data": {"template": {"max_prompt_tokens": 256}},
    "rollout": {
        "workers": 1,
        "max_sequences": 64,
        "engine": {
            "max_model_len": 320,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": 64 << 20,
        },
        "sampling": {"max_tokens": 48},
    },
    "rewards": {"weights": {"format": 0.5, "accuracy": 0.5}, "numeric": "exact"},
    "learner": {
        "objective": {"beta": 0.02},
        "optimizer": {"freeze": ["visual", "audio_tower"]},
    },
    "buffer": {"warm_up": 64},
    "loop": {"prompts_per_step": 8},
}
