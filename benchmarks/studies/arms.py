"""What the study compares. Fixed before the report's seeds are run; settings were chosen on the
tuning seeds only."""

from __future__ import annotations

from avatar_rl.cluster.recipe.overlays import Overlay, merge
from benchmarks.studies.runs import Arm, Pool

#: Question types on which the cold start leaves room, 28 prompts: GRPO meets each every 3 or 4
#: steps.
POOL = Pool(
    ("beeps", "direction", "localise", "side", "colour_at_beep", "count_left_of"),
    train=28,
    heldout=100,
)
#: Completions per prompt at each measurement, sampled as in training. They are not charged to any
#: arm.
SAMPLES = 4
TARGETS = (0.70, 0.80, 0.85)
#: Training accuracy that the ratios are about; a run stops at the first measurement of STOP_AT or
#: more.
TARGET = 0.80
STOP_AT = 0.85
#: Completions after which a run that is not there yet ends, censored.
CAP = 1536
#: A run that only shows that the study still runs.
SMOKE_ARM = "avatar_plus"
SMOKE_POOL = Pool(POOL.categories, train=6, heldout=4)
SMOKE_CAP = 16
TUNING_SEEDS = (100, 101, 102)
REPORT_SEEDS = (0, 1, 2, 3, 4)


def rate(lr: float) -> Overlay:
    return {"learner": {"optimizer": {"lr": lr}}}


#: What the report runs. A learning rate beside a name: the arm counts with its best one.
ARMS: dict[str, Arm] = {
    "grpo@2e-4": Arm("grpo", rate(2e-4)),
    "grpo@4e-4": Arm("grpo", rate(4e-4)),
    "grpo@8e-4": Arm("grpo", rate(8e-4)),
    "grpo4@4e-4": Arm("grpo4", rate(4e-4)),
    "grpo4@8e-4": Arm("grpo4", rate(8e-4)),
    "grpo_updates@1e-4": Arm("grpo_updates", rate(1e-4)),
    "grpo_updates@2e-4": Arm("grpo_updates", rate(2e-4)),
    "grpo_updates@4e-4": Arm("grpo_updates", rate(4e-4)),
    "replay_only": Arm("replay_only", rate(4e-4)),
    "avatar_no_hint": Arm("avatar_no_hint", rate(4e-4)),
    "avatar@4e-4": Arm("avatar", rate(4e-4)),
    "avatar@8e-4": Arm("avatar", rate(8e-4)),
    "avatar_plus": Arm("avatar_plus", rate(2e-4)),
}

_STRATIFIED: Overlay = {"buffer": {"window": 4, "strategy": "stratified"}}

#: Run by --tune beside ARMS: settings among which avatar_plus and the learning rates of the others
#: are chosen.
CANDIDATES: dict[str, Arm] = {
    "plus_stratified": Arm("avatar_plus", merge(rate(2e-4), _STRATIFIED)),
    "plus_updates_8": Arm(
        "avatar_plus", merge(rate(1.5e-4), merge(_STRATIFIED, {"learner": {"updates": 8}}))
    ),
    "plus_one_fresh": Arm(
        "avatar_plus",
        merge(
            rate(2e-4), {"loop": {"fresh": 1}, "buffer": {"window": 3, "strategy": "stratified"}}
        ),
    ),
    "plus_four_prompts": Arm(
        "avatar_plus",
        merge(rate(2e-4), {"loop": {"prompts_per_step": 4, "fresh": 4, "replayed": 6}}),
    ),
    "plus_positive": Arm(
        "avatar_plus", merge(rate(2e-4), {"learner": {"objective": {"replay_sign": "positive"}}})
    ),
    "plus_joint": Arm(
        "avatar_plus",
        merge(
            rate(2e-4),
            {
                "buffer": {"strategy": "same_prompt"},
                "learner": {"objective": {"fresh_advantage": "group", "replay_advantage": "joint"}},
            },
        ),
    ),
}
GRPO_ARMS = tuple(name for name in ARMS if name.startswith("grpo@"))
#: Figure: (arm above, arm below); an arm stands for its best learning rate, "grpo" for the best of
#: GRPO_ARMS.
RATIOS = {
    "completions_ratio": ("grpo", "avatar_plus"),
    "avatar_ratio": ("grpo", "avatar"),
    "ratio_vs_grpo4": ("grpo4", "avatar_plus"),
    "ratio_vs_update_matched": ("grpo_updates", "avatar_plus"),
}
