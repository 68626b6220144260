"""What the ablations compare: the papers' tables of parts, one thing at a time (docs/papers.md).
Fixed before the runs."""

from __future__ import annotations

from avatar_rl.cluster.recipe.overlays import Overlay, merge
from benchmarks.studies.arms import rate
from benchmarks.studies.runs import Arm

LR = 4e-4
SEEDS = (0, 1, 2, 3, 4)
#: Completions of every run; none stops earlier, so that all are compared over the same stretch.
COMPLETIONS = 320
#: Completions between two measurements of the pool, where a step is not longer.
MEASURE = 64
PROMPTS_PER_STEP = 8


def _arm(over: Overlay, preset: str = "avatar", *, untrained: bool = False) -> Arm:
    return Arm(preset, merge(rate(LR), over), untrained)


def _rewards(stage: int, baseline: str) -> Arm:
    """A stage's reward weights, the replayed half against its own mean or against the prompt's
    (VCRS). The judge is the world's exact rule."""
    return _arm(
        {
            "rewards": {"stage": stage, "judge": {"kind": "rule"}},
            "learner": {"objective": {"replay_advantage": baseline}},
        }
    )


def _split(fresh: int) -> Arm:
    return _arm({"loop": {"fresh": fresh, "replayed": 8 - fresh}})


def _strength(value: float) -> Arm:
    return _arm({"learner": {"objective": {"tas_lambda": value}}})


BASE = "avatar"
ARMS: dict[str, Arm] = {
    BASE: _arm({}),
    "grpo": _arm({}, "grpo"),
    "tas_only": _arm({}, "tas_only"),
    "accuracy + format": _rewards(1, "batch_mean"),
    "+ self-consistency": _rewards(2, "batch_mean"),
    "+ judge": _rewards(3, "batch_mean"),
    "+ VCRS": _rewards(3, "vcrs"),
    "7:1": _split(7),
    "5:3": _split(5),
    "3:5": _split(3),
    "lambda 2": _strength(2.0),
    "lambda 4": _strength(4.0),
    "grpo, no SFT": _arm({}, "grpo", untrained=True),
    "avatar, no SFT": _arm({}, untrained=True),
}
#: Tables and panels: title -> (label, arm); the first of each is what the others are held against.
GROUPS: dict[str, tuple[tuple[str, str], ...]] = {
    "method": (("grpo", "grpo"), ("tas_only", "tas_only"), ("avatar", BASE)),
    "rewards, cumulative": (
        ("accuracy + format", "accuracy + format"),
        ("+ self-consistency", "+ self-consistency"),
        ("+ judge", "+ judge"),
        ("+ VCRS", "+ VCRS"),
    ),
    "fresh:replayed": (("4:4", BASE), ("7:1", "7:1"), ("5:3", "5:3"), ("3:5", "3:5")),
    "lambda": (("0.3", BASE), ("2", "lambda 2"), ("4", "lambda 4")),
    "SFT and method": (
        ("no SFT, grpo", "grpo, no SFT"),
        ("no SFT, avatar", "avatar, no SFT"),
        ("SFT, grpo", "grpo"),
        ("SFT, avatar", BASE),
    ),
}
#: Whose share of solved prompts is drawn over time.
SOLVED = ("grpo", "tas_only", BASE)
#: A run that only shows that the ablations still run: the one with most parts.
SMOKE_ARM = "+ VCRS"


def measured_every(arm: Arm) -> int:
    """Steps between measurements: all arms are measured after about as many completions."""
    fresh = {"grpo": 8, "tas_only": 8}.get(arm.preset, 4)
    fresh = int(arm.over.get("loop", {}).get("fresh", fresh))
    return max(1, MEASURE // (PROMPTS_PER_STEP * fresh))
