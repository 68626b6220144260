"""What the sweeps vary: one thing at a time, around the paper's rule as the study runs it. Fixed
before the runs."""

from __future__ import annotations

from avatar_rl.cluster.recipe.overlays import Overlay, merge
from benchmarks.studies.arms import rate
from benchmarks.studies.runs import Arm

LR = 4e-4
SEEDS = (0, 1, 2)
#: Completions of every run; none stops earlier, so that all are compared over the same stretch.
COMPLETIONS = 576
#: Completions between two measurements of the pool, where a step is not longer.
MEASURE = 32
PROMPTS_PER_STEP = 8


def avatar(over: Overlay, preset: str = "avatar") -> Arm:
    return Arm(preset, merge(rate(LR), over))


def split(fresh: int) -> Arm:
    return avatar({"loop": {"fresh": fresh, "replayed": 8 - fresh}})


def shaped(shape: str, strength: float) -> Arm:
    return avatar({"learner": {"objective": {"tas_shape": shape, "tas_lambda": strength}}})


BASE = "avatar"
ARMS: dict[str, Arm] = {
    BASE: avatar({}),
    "grpo": avatar({}, "grpo"),
    "replay_only": avatar({}, "replay_only"),
    "avatar_no_hint": avatar({}, "avatar_no_hint"),
    "8:0": split(8),
    "6:2": split(6),
    "2:6": split(2),
    "1:7": split(1),
    "lambda 0": shaped("parabolic", 0.0),
    "lambda 0.1": shaped("parabolic", 0.1),
    "lambda 1": shaped("parabolic", 1.0),
    "linear_decay": shaped("linear_decay", 0.3),
    "linear_incline": shaped("linear_incline", 0.3),
    "inverse_parabolic": shaped("inverse_parabolic", 0.3),
}
#: Figure panels: title -> (label, arm).
SWEEPS: dict[str, tuple[tuple[str, str], ...]] = {
    "parts": tuple((name, name) for name in ("grpo", "replay_only", "avatar_no_hint", BASE)),
    "fresh : replayed": (
        ("8:0", "8:0"),
        ("6:2", "6:2"),
        ("4:4", BASE),
        ("2:6", "2:6"),
        ("1:7", "1:7"),
    ),
    "lambda": (("0", "lambda 0"), ("0.1", "lambda 0.1"), ("0.3", BASE), ("1", "lambda 1")),
    "shape, lambda 0.3": (
        ("uniform", "lambda 0"),
        ("linear_decay", "linear_decay"),
        ("linear_incline", "linear_incline"),
        ("parabolic", BASE),
        ("inverse", "inverse_parabolic"),
    ),
}


def measured_every(arm: Arm) -> int:
    """Steps between measurements, so that all arms are measured after about as many completions."""
    fresh = {"grpo": 8}.get(arm.preset, arm.over.get("loop", {}).get("fresh", 4))
    return max(1, MEASURE // (PROMPTS_PER_STEP * fresh))
