"""Named overlays of the recipe: the published methods and the baselines they are compared with
(docs/method.md 1.6, 3)."""

from __future__ import annotations

from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import JsonObject

#: Some keys of a recipe, laid over others.
Overlay = JsonObject

_FRESH_ONLY: Overlay = {"loop": {"fresh": 8, "replayed": 0}}
_MIXED: Overlay = {"loop": {"fresh": 4, "replayed": 4}}
_TAS: Overlay = {"learner": {"objective": {"tas_lambda": 0.3}}}
_NO_TAS: Overlay = {"learner": {"objective": {"tas_lambda": 0.0}}}
_HINTS: Overlay = {"buffer": {"hints": {"enabled": True}}}
_NO_HINTS: Overlay = {"buffer": {"hints": {"enabled": False}}}
#: docs/method.md 2.3
_GSPO_OMNI: Overlay = {
    "learner": {
        "objective": {"ratio": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.03}
    }
}
#: One baseline for all, the prompt's moving average, so that no group is dead; the ratio against
#: the current policy, weighted by current / behaviour up to 2 (truncated importance sampling), so
#: that stale trajectories stay sound.
_PLUS: Overlay = {
    "loop": {"prompts_per_step": 8, "fresh": 2, "replayed": 3, "schedule": "open"},
    "buffer": {"warm_up": 0, "window": 8, "strategy": "uniform", "reward_diverse": True},
    "learner": {
        "updates": 4,
        "objective": {
            "fresh_advantage": "vcrs",
            "alpha": 1.0,
            "mismatch": "token_truncate",
            "mismatch_cap": 2.0,
        },
    },
}

PRESETS: dict[str, tuple[str, tuple[Overlay, ...]]] = {
    "grpo": (
        "8 fresh completions per prompt, no replay, no shaping",
        (_FRESH_ONLY, _NO_TAS, _NO_HINTS),
    ),
    "grpo4": (
        "4 fresh completions per prompt, no replay: the control for replay",
        ({"loop": {"fresh": 4, "replayed": 0}}, _NO_TAS, _NO_HINTS),
    ),
    "tas_only": (
        "8 fresh completions with temporal advantage shaping",
        (_FRESH_ONLY, _TAS, _NO_HINTS),
    ),
    "replay_only": ("4 fresh + 4 replayed, no shaping, no hints", (_MIXED, _NO_TAS, _NO_HINTS)),
    "avatar_no_hint": ("4 fresh + 4 replayed with shaping", (_MIXED, _TAS, _NO_HINTS)),
    "avatar": (
        "4 fresh + 4 replayed with shaping and hints: the paper's method",
        (_MIXED, _TAS, _HINTS),
    ),
    "avatar_plus": (
        "2 fresh + 3 replayed, 4 updates a step, prompts by what they miss: fewest completions",
        (_PLUS, _NO_TAS, _NO_HINTS),
    ),
    "grpo_updates": (
        "8 fresh, no replay, as many updates per completion as avatar_plus: the control for "
        "updates",
        (_FRESH_ONLY, _NO_TAS, _NO_HINTS, {"learner": {"updates": 16}}),
    ),
    "gspo": (
        "8 fresh, sequence-level ratio with GSPO's clip range",
        (
            _FRESH_ONLY,
            _NO_TAS,
            _NO_HINTS,
            {
                "learner": {
                    "objective": {"ratio": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
                }
            },
        ),
    ),
    "dapo": (
        "8 fresh, token mean over the batch, higher upper clip",
        (
            _FRESH_ONLY,
            _NO_TAS,
            _NO_HINTS,
            {"learner": {"objective": {"loss_type": "dapo", "epsilon_high": 0.28}}},
        ),
    ),
    "dr_grpo": (
        "8 fresh, constant denominator, advantages not divided by the deviation",
        (
            _FRESH_ONLY,
            _NO_TAS,
            _NO_HINTS,
            {"learner": {"objective": {"loss_type": "dr_grpo", "scale_rewards": "none"}}},
        ),
    ),
    "omnivideo_qi": (
        "OmniVideo-R1's query-intensive rewards under GSPO (docs/method.md 2.1)",
        (
            _FRESH_ONLY,
            _NO_TAS,
            _NO_HINTS,
            _GSPO_OMNI,
            {
                "rewards": {
                    "weights": {
                        "grounding_format": 1.0,
                        "accuracy": 1.0,
                        "segment_consistency": 0.5,
                        "segment_completeness": 0.5,
                    }
                }
            },
        ),
    ),
    "omnivideo_ma": (
        "OmniVideo-R1's modality-attentive reward under GSPO (docs/method.md 2.2)",
        (
            _FRESH_ONLY,
            _NO_TAS,
            _NO_HINTS,
            _GSPO_OMNI,
            {"rewards": {"weights": {"format": 1.0, "accuracy": 1.0, "fusion": 1.0}}},
        ),
    ),
}


def preset(name: str) -> Overlay:
    """The merged overlay of a preset. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    merged: Overlay = {}
    for overlay in PRESETS[name][1]:
        merged = merge(merged, overlay)
    return merged


def merge(base: Overlay, over: Overlay) -> Overlay:
    """``over`` laid on ``base``, dictionaries merged key by key, everything else replaced."""
    result = dict(base)
    for key, value in over.items():
        known = result.get(key)
        result[key] = (
            merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
        )
    return result
