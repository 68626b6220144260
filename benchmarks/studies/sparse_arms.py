"""The sparse study's protocol: pool, cold start, targets, cap, arms and seeds. Fixed before the
report's seeds are run; rates and settings were chosen on the tuning seeds only."""

from __future__ import annotations

import hashlib
import json

from avatar_rl.cluster.recipe.overlays import Overlay, merge
from avatar_rl.prompts.synthetic.config import Category, WorldConfig
from benchmarks.studies.arms import rate
from benchmarks.studies.habits import Habits
from benchmarks.studies.runs import Arm

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
    n_sft=1600,
    weights=dict.fromkeys(HABITS.answers, 1.0),
    guess_share={},
    hinted_share=0.0,
    sft_weights=dict.fromkeys(HABITS.answers, 1.0),
)
#: The demo's own cold start sees and hears already; it is taught the habits on top.
BEFORE = "recipes/assets/tiny_omni"
COLD_START: Overlay = {
    "steps": 200,
    "batch_size": 32,
    "ranks": 1,
    "optimizer": {"lr": 7e-4, "betas": [0.9, 0.95], "weight_decay": 0.01},
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

#: Completions per prompt at each measurement, sampled as in training. They are not charged.
SAMPLES = 4
#: Completions between two measurements, alike for all arms (whole steps, so a few more at most).
MEASURE = 64
TARGETS = (0.40, 0.60, 0.80)
#: Training accuracy that the ratios are about; a run stops at the first measurement at or above.
TARGET = 0.80
#: Completions after which a run that is not there counts as censored.
CAP = 3072
#: What the start may answer; a pool above it is none of rare successes.
START = (0.01, 0.05)
TUNING_SEEDS = (100, 101)
REPORT_SEEDS = (0, 1, 2, 3, 4)

#: With 48 prompts a prompt comes back every six steps. The default of three visits at zero would
#: mean no hint before 1,152 completions of GRPO; one visit favours the arms with hints.
_HINTS: Overlay = {"buffer": {"hints": {"enabled": True, "zero_patience": 1}}}
#: Replays as good as fresh ones, from the last eight versions, none better than another.
_FIFO: Overlay = {
    "buffer": {"strategy": "uniform", "max_age_versions": 8},
    "learner": {"objective": {"alpha": 1.0}},
}
#: By the size of the advantage, halved with every four versions of age.
_AGED: Overlay = {
    "buffer": {"strategy": "magnitude", "priority_half_life": 4.0},
    "learner": {"objective": {"alpha": 1.0}},
}
_SAMPLING: Overlay = {"loop": {"dynamic_sampling": {"attempts": 4}}}


def _arm(preset: str, lr: float, over: Overlay | None = None) -> Arm:
    return Arm(preset, merge(rate(lr), over or {}))


#: What the report runs, the most important first. A learning rate beside a name: the arm counts
#: with its best one.
ARMS: dict[str, Arm] = {
    "avatar_plus": _arm("avatar_plus", 2e-4),
    "grpo@4e-4": _arm("grpo", 4e-4),
    "grpo@8e-4": _arm("grpo", 8e-4),
    "grpo@2e-4": _arm("grpo", 2e-4),
    "avatar@4e-4": _arm("avatar", 4e-4, _HINTS),
    "grpo_hints@4e-4": _arm("grpo", 4e-4, _HINTS),
    "grpo_updates@2e-4": _arm("grpo_updates", 2e-4),
    "fifo@4e-4": _arm("replay_only", 4e-4, _FIFO),
    "aged_priority@4e-4": _arm("replay_only", 4e-4, _AGED),
    "grpo_sampling@4e-4": _arm("grpo", 4e-4, _SAMPLING),
    "avatar_no_hint@4e-4": _arm("avatar_no_hint", 4e-4),
    "avatar@2e-4": _arm("avatar", 2e-4, _HINTS),
    "avatar_no_hint@2e-4": _arm("avatar_no_hint", 2e-4),
    "grpo@1e-4": _arm("grpo", 1e-4),
}
GRPO_ARMS = tuple(name for name in ARMS if name.startswith("grpo@"))
#: Figure: (arm above, arm below); an arm stands for its best learning rate.
RATIOS = {
    "completions_ratio": ("grpo", "avatar_plus"),
    "avatar_ratio": ("grpo", "avatar"),
    "avatar_no_hint_ratio": ("grpo", "avatar_no_hint"),
    "ratio_vs_grpo_hints": ("grpo_hints", "avatar_plus"),
    "ratio_vs_update_matched": ("grpo_updates", "avatar_plus"),
    "ratio_vs_dynamic_sampling": ("grpo_sampling", "avatar_plus"),
    "ratio_vs_avatar": ("avatar", "avatar_plus"),
    "ratio_vs_fifo": ("fifo", "avatar_plus"),
    "ratio_vs_aged_priority": ("aged_priority", "avatar_plus"),
}
#: Run by --tune beside ARMS: what avatar_plus and the others are chosen among.
CANDIDATES: dict[str, Arm] = {
    "plus@4e-4": _arm("avatar_plus", 4e-4),
}
#: A run that only shows that the study still runs.
SMOKE_ARM = "avatar_plus"
SMOKE_CAP = 16
SMOKE_START: Overlay = COLD_START | {"steps": 2}
SMOKE_WORLD = WORLD.model_copy(update={"n_train": 24, "n_heldout": 24, "n_sft": 32})


def ground_of(start: Overlay = COLD_START, pool: int = POOL) -> Overlay:
    """What stands for the files of a run in its digest."""
    return {
        "world": WORLD.model_dump(mode="json"),
        "habits": [dict(HABITS.answers), HABITS.hinted_share, HABITS.look_share],
        "pool": [pool, HELDOUT],
        "before": BEFORE,
        "start": start,
    }


def protocol() -> str:
    """Digest of all that has to be the same in every run of the study, whatever its arm."""
    fixed = [ground_of(), RECIPE, SAMPLES, MEASURE, TARGET, CAP]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]
