"""Named overlays of the recipe: the published methods and the baselines they are compared with
(docs/method.md 1.6, 3).

A preset names every key that any preset touches: what it does not state stands at its default. So a
preset in place of another leaves no residue of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.overlays import Overlay, has, merge, nested, value_at
from avatar_rl.common.config import subsection
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import Json

DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """A key's value in a preset, and where it comes from."""

    value: Json
    source: str


@dataclass(frozen=True)
class Preset:
    """A named method. ``stated`` has the keys that make it, dotted."""

    meaning: str
    stated: Mapping[str, Setting]


def _of(source: str, **values: Json) -> dict[str, Setting]:
    """Settings of one source; two underscores stand for a dot."""
    return {name.replace("__", "."): Setting(value, source) for name, value in values.items()}


def _objective(source: str, **values: Json) -> dict[str, Setting]:
    return {f"learner.objective.{name}": Setting(value, source) for name, value in values.items()}


def _weights(source: str, **weights: float) -> dict[str, Setting]:
    return {"rewards.weights": Setting(dict(weights), source)}


_FRESH_ONLY = _of("docs/method.md 3", loop__fresh=8, loop__replayed=0)
_MIXED = _of("AVATAR 1.1 [P]", loop__fresh=4, loop__replayed=4)
_TAS = _objective("AVATAR 1.2 [P]", tas_shape="parabolic", tas_lambda=0.3)
_NO_TAS = _objective("docs/method.md 3", tas_lambda=0.0)
_HINTS = _of("AVATAR 1.4 [P]", buffer__hints__enabled=True)
_NO_HINTS = _of("docs/method.md 3", buffer__hints__enabled=False)
_PLAIN = _FRESH_ONLY | _NO_TAS | _NO_HINTS
_AVATAR = _MIXED | _TAS | _HINTS
_GSPO = _objective("GSPO 2.3 [P]", ratio="sequence", epsilon=3e-4, epsilon_high=4e-4)

#: Both set-ups of AVATAR (docs/method.md 1.6).
_AVATAR_BOTH = (
    _AVATAR
    | _objective("AVATAR 1.1 [D, C]", epsilon=0.2, beta=0.1, replay_advantage="vcrs")
    | _of("AVATAR 1.3 [P]", buffer__capacity=10_000, buffer__window=20)
    | _of(
        "AVATAR 1.6 [P, C]",
        learner__optimizer__lr=5e-7,
        learner__warmup=0.05,
        learner__optimizer__dtype="auto",  # bfloat16 on a GPU
        rollout__sampling__temperature=1.0,
        rollout__sampling__top_p=1.0,
        rollout__sampling__top_k=50,
        rollout__sampling__max_tokens=2048,
        rollout__engine__max_model_len=16_384,
    )
)

#: QI's output, which both stages of OmniVideo-R1 ask for (docs/method.md 2.1, 2.2).
QI_INSTRUCTION = (
    "First list 1 to 8 moments that matter, in order, each as "
    "<time>1.0-2.5</time><caption>what is seen and heard</caption>; then think inside <thinking> "
    "</thinking>; then give only the final answer inside <answer> </answer>."
)
_OMNIVIDEO = (
    _PLAIN
    | _GSPO
    | _objective("OmniVideo-R1 2.3 [C]", beta=0.03, mask_truncated_completions=True)
    | _of("OmniVideo-R1 2.3 [D]", learner__optimizer__lr=1e-6)
    | _of(
        "OmniVideo-R1 2.3 [C]",
        data__media__max_frames=64,
        rollout__sampling__max_tokens=8192,
        learner__lora={"targets": ["llm"]},  # vision tower and aligner frozen
    )
    | _of(
        "OmniVideo-R1 2.3 [D]: longest sequence 32,768",
        rollout__engine__max_model_len=32_768,
        data__template__max_prompt_tokens=24_576,
    )
    | _of(
        "OmniVideo-R1 2.1, 2.2 [C]: one format in both stages",
        data__template__instruction=QI_INSTRUCTION,
        rewards__grounding="strict",
    )
)

#: One baseline for all, the prompt's moving average, so that no group is dead; the ratio against
#: the current policy, weighted by current / behaviour up to 2 (truncated importance sampling), so
#: that stale trajectories stay sound.
_PLUS = (
    _of(
        "docs/science.md",
        loop__prompts_per_step=8,
        loop__fresh=2,
        loop__replayed=3,
        loop__schedule="open",
        buffer__warm_up=0,
        buffer__window=8,
        buffer__strategy="uniform",
        buffer__reward_diverse=True,
        learner__updates=4,
    )
    | _objective(
        "docs/science.md",
        fresh_advantage="vcrs",
        alpha=1.0,
        old_logprobs="current",
        mismatch="token_truncate",
        mismatch_cap=2.0,
    )
    | _NO_TAS
    | _NO_HINTS
)

PRESETS: dict[str, Preset] = {
    "grpo": Preset("8 fresh completions per prompt, no replay, no shaping", _PLAIN),
    "grpo4": Preset(
        "4 fresh completions per prompt, no replay: the control for replay",
        _PLAIN | _of("docs/method.md 3", loop__fresh=4),
    ),
    "tas_only": Preset(
        "8 fresh completions with temporal advantage shaping", _FRESH_ONLY | _TAS | _NO_HINTS
    ),
    "replay_only": Preset(
        "4 fresh + 4 replayed, no shaping, no hints", _MIXED | _NO_TAS | _NO_HINTS
    ),
    "avatar_no_hint": Preset("4 fresh + 4 replayed with shaping", _MIXED | _TAS | _NO_HINTS),
    "avatar": Preset("4 fresh + 4 replayed with shaping and hints: the paper's method", _AVATAR),
    "paper": Preset(
        "AVATAR as its paper sets it up: rates, lengths, LoRA on all parts, 32 frames",
        _AVATAR_BOTH
        | _objective("AVATAR 1.1 [D]", alpha=0.6)
        | _of("AVATAR 1.5 [D]", rewards__format="signed")
        | _of("AVATAR 1.3 [P]", buffer__strategy="stratified")
        | _of("AVATAR 1.3 [R]", buffer__warm_up=128)
        | _of(
            "AVATAR 1.6 [P]",
            learner__lora={"rank": 16, "targets": ["vision", "audio", "projector", "llm"]},
            data__reader__frames=32,
        ),
    ),
    "official_code": Preset(
        "AVATAR as its released code sets it up: alpha 1, format 1/0, LoRA r 8, 16 frames",
        _AVATAR_BOTH
        | _objective("AVATAR 1.1 [C]", alpha=1.0)
        | _of("AVATAR 1.5 [C]", rewards__format="binary")
        | _weights("AVATAR 1.6 [C]", accuracy=1.0, format=0.5)
        | _of("AVATAR 1.6 [C]", buffer__warm_up=10, buffer__strategy="priority")
        | _of(
            "AVATAR 1.6 [C]",
            learner__lora={"rank": 8, "alpha": 32, "targets": ["all-linear"]},
            learner__optimizer__zero_stage=2,
            data__reader__frames=16,
            data__reader__max_pixels=50_176,
            data__reader__image_max_pixels=401_408,
            data__reader__audio_in_video=True,
        ),
    ),
    "avatar_plus": Preset(
        "2 fresh + 3 replayed, 4 updates a step, prompts by what they miss: fewest completions",
        _PLUS,
    ),
    "grpo_updates": Preset(
        "8 fresh, no replay, as many updates per completion as avatar_plus: the control for "
        "updates",
        _PLAIN | _of("docs/science.md", learner__updates=16),
    ),
    "gspo": Preset("8 fresh, sequence-level ratio with GSPO's clip range", _PLAIN | _GSPO),
    "dapo": Preset(
        "8 fresh, token mean over the batch, higher upper clip, dynamic sampling, overlong shaping",
        _PLAIN
        | _objective("DAPO 3 [P]", loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0)
        | _of("DAPO 3 [P]; the bound is ours [R]", loop__dynamic_sampling__attempts=4)
        | _weights("DAPO 3 [P]; the scale is Stage 1's [D]", format=0.5, accuracy=0.5, overlong=0.5)
        | _of("DAPO 3 [P]: 4,096 of 20,480 tokens", rewards__overlong_share=0.2),
    ),
    "dr_grpo": Preset(
        "8 fresh, constant denominator, advantages not divided by the deviation",
        _PLAIN | _objective("Dr. GRPO 3 [P]", loss_type="dr_grpo", scale_rewards="none"),
    ),
    "omnivideo_qi": Preset(
        "OmniVideo-R1's query-intensive rewards under GSPO (docs/method.md 2.1)",
        _OMNIVIDEO
        | _weights(
            "OmniVideo-R1 2.1 [C]",
            grounding_format=1.0,
            answer_judge=1.0,
            accuracy=0.0,  # scored and logged
            segment_consistency=0.5,
            segment_completeness=0.5,
        )
        | _of("OmniVideo-R1 2.3 [C]: 128 completions", loop__prompts_per_step=16),
    ),
    "omnivideo_ma": Preset(
        "OmniVideo-R1's modality-attentive reward under GSPO (docs/method.md 2.2)",
        _OMNIVIDEO
        | _weights(
            "OmniVideo-R1 2.2 [C]",
            grounding_format=1.0,
            answer_judge=1.0,
            accuracy=0.0,  # scored and logged
            fusion=1.0,
        )
        | _of(
            "OmniVideo-R1 2.3 [C]: 112 completions, and two unimodal ones beside each [R]",
            loop__prompts_per_step=14,
        ),
    ),
}

#: Every key that any preset states, in the order of a recipe's sections.
TOUCHED: tuple[str, ...] = tuple(
    sorted(
        {key for preset in PRESETS.values() for key in preset.stated},
        key=lambda key: (list(RunConfig.model_fields).index(key.partition(".")[0]), key),
    )
)


def resolved(name: str) -> dict[str, Setting]:
    """Every touched key with its value in the preset. Raises ConfigError for an unknown name."""
    found = _named(name).stated
    return {key: found.get(key) or Setting(default_of(key), DEFAULT) for key in TOUCHED}


def preset(name: str) -> Overlay:
    """A preset as an overlay, all touched keys named. Raises ConfigError for an unknown name."""
    return _overlay(resolved(name))


def stated(name: str) -> Overlay:
    """Only what makes the preset. Raises ConfigError for an unknown name."""
    return _overlay(_named(name).stated)


def by_hand(name: str, given: Overlay) -> list[tuple[str, Json, Json]]:
    """Keys that ``given`` sets against what the preset states, each with both values, hers first.
    What is given by hand wins (docs/your-own-run.md)."""
    found = []
    for key, setting in _named(name).stated.items():
        if has(given, key):
            mine = value_at(given, key)
            if isinstance(mine, dict) and isinstance(setting.value, dict) and key != _WEIGHTS:
                setting_value = merge(setting.value, mine)
                differs = setting_value != setting.value
            else:
                differs = mine != setting.value
            if differs:
                found.append((key, mine, setting.value))
    return found


_WEIGHTS = "rewards.weights"  # one value: they replace one another as a whole


def default_of(key: str) -> Json:
    """The default of a dotted key of a recipe, as JSON has it."""
    *parents, leaf = key.split(".")
    section: type[BaseModel] | None = RunConfig
    for part in parents:
        section = subsection(section, part) if section is not None else None
    assert section is not None, f"{key} is no key of a recipe"
    value: Any = section.model_fields[leaf].get_default(call_default_factory=True)  # type: ignore[call-arg]
    plain: Json = to_jsonable_python(value)
    return plain


def _named(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _overlay(settings: Mapping[str, Setting]) -> Overlay:
    overlay: Overlay = {}
    for key, setting in settings.items():
        value = setting.value
        overlay = merge(overlay, nested(key, dict(value) if isinstance(value, dict) else value))
    return overlay
