"""The recipe's `rewards` section."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from avatar_rl.common.config import Section, warn_once
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import Json
from avatar_rl.prompts.record import Modality
from avatar_rl.rewards.answers.format import FormatScale
from avatar_rl.rewards.answers.numeric import NumericMode

#: Built-in components and what they pay.
BUILTIN: dict[str, str] = {
    "format": "<think>...</think><answer>...</answer>, whole string (docs/method.md 1.5)",
    "accuracy": "the answer against the truth, by problem type (docs/method.md 1.5)",
    "self_consistency": "agreement with the majority of the fresh group (docs/method.md 1.5)",
    "judge": "mean of four criteria by a frozen model or exact rules (docs/method.md 1.5)",
    "grounding_format": "time-caption segments, thinking, answer; 1/0 (docs/method.md 2.1)",
    "segment_consistency": "how well each caption fits its clip (docs/method.md 2.1)",
    "segment_completeness": "how well the segments' clips answer the question (docs/method.md 2.1)",
    "overlong": "0 to -1 over the last tokens before the limit (docs/method.md 3)",
    "answer_judge": "letter match; open answers by the judge (docs/method.md 2.1)",
    "fusion": "0.3 if the answer is at least as good as both unimodal ones (docs/method.md 2.2)",
}

#: Components that ask the judge.
JUDGED = frozenset({"judge", "segment_consistency", "segment_completeness", "answer_judge"})

#: Weights of the three RL stages (docs/method.md 1.5).
STAGE_WEIGHTS: dict[int, dict[str, float]] = {
    1: {"format": 0.5, "accuracy": 0.5},
    2: {"format": 0.2, "accuracy": 0.4, "self_consistency": 0.4},
    3: {"format": 0.1, "accuracy": 0.3, "self_consistency": 0.2, "judge": 0.4},
}

#: What a completion earns for answering at least as well as both of its unimodal counterparts.
ATTENTION_BONUS = 0.3

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class JudgeConfig(EndpointConfig):
    """Who judges. ``base_url`` and ``model`` are for kind 'openai'; 'managed' finds its own."""

    kind: Literal["openai", "rule", "managed"] = Field(
        default="openai",
        description="'openai': a model behind an OpenAI-compatible endpoint; 'managed': one that "
        "the run serves itself; 'rule': exact, for the synthetic world.",
    )
    prompt: Path | None = Field(
        default=None,
        description="Text file with the prompt of component 'judge', in place of ours "
        "(rewards/README.md).",
    )
    max_chars: int = Field(
        default=8_000,
        ge=100,
        description="Reasoning is quoted to the judge up to this many characters.",
    )
    attach: tuple[Modality, ...] = Field(
        default=(),
        description="Media sent along: frames as JPEG data URLs, sound as WAV; the judge must "
        "take them.",
    )
    attach_frames: int = Field(
        default=8, ge=1, description="Most frames sent per question, evenly chosen."
    )
    managed: ManagedJudgeConfig = Field(
        default_factory=lambda: ManagedJudgeConfig(), description="The server of kind 'managed'."
    )

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if self.kind == "managed" and self.managed.path is None:
            raise ConfigError(
                "rewards.judge.kind is managed but rewards.judge.managed.path names no model folder"
            )
        return self


class ManagedJudgeConfig(Section):
    """A vLLM OpenAI server beside the run, on loopback, stopped with it."""

    path: Path | None = Field(default=None, description="Model folder that is served.")
    gpus: int = Field(
        default=0, ge=0, description="GPUs it takes (tensor parallel); 0 runs it on the CPU build."
    )
    visible_devices: str | None = Field(
        default=None,
        description="CUDA_VISIBLE_DEVICES of the server, e.g. '3'; keep them out of the run's own.",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of the server without GPUs.")
    max_model_len: int = Field(
        default=8_192, ge=256, description="Longest question and reply, in tokens."
    )
    start_timeout_s: float = Field(
        default=600.0, gt=0, description="Deadline until it answers /health."
    )
    arguments: tuple[str, ...] = Field(default=(), description="Further arguments of the server.")


class FusionConfig(Section):
    """r_attn of OmniVideo-R1 (docs/method.md 2.2)."""

    signal: Literal["correctness", "confidence"] = Field(
        default="correctness",
        description="correctness: the answer's reward; confidence: mean log-probability of the "
        "answer's tokens.",
    )
    strict: bool = Field(
        default=False, description="Pay only above both unimodal answers, not at a tie."
    )


class RewardConfig(Section):
    """Reward components, their weights and their options."""

    stage: Literal[1, 2, 3] | None = Field(
        default=None,
        description="The weights of this RL stage (docs/method.md 1.5), in place of `weights`.",
    )
    weights: dict[str, float] = Field(
        default_factory=lambda: dict(STAGE_WEIGHTS[1]),
        description="Component name or import path 'pkg.mod:fn' -> weight; weight 0 scores and "
        "logs without paying.",
    )
    format: FormatScale = Field(
        default="signed", description="Format pays +1/-1 ('signed', paper) or 1/0 ('binary', code)."
    )
    think_prefilled: Literal["auto"] | bool = Field(
        default="auto",
        description="Whether the chat template ends with the opening think tag, which completions "
        "then lack; 'auto' looks at the run's template (outside a run both forms are right).",
    )
    numeric: NumericMode = Field(
        default="rmae",
        description="Numerical answers: 'rmae', 'exact' to two decimals, or 'relative' within "
        "1e-3.",
    )
    max_answer_chars: int = Field(
        default=4_096,
        ge=16,
        description="Longer answers (and over 4 times the truth) score 0 unread; bounds scoring "
        "time.",
    )
    grounding: Literal["strict", "lenient"] = Field(
        default="strict",
        description="Segments in order, disjoint, whole string ('strict'), or merely present "
        "('lenient').",
    )
    overlong_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Length at which 'overlong' is -1; null is rollout.sampling.max_tokens.",
    )
    overlong_share: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Part of that length over which it grows from 0.",
    )
    answer_judge: Literal["open", "all"] = Field(
        default="open",
        description="What 'answer_judge' asks the judge: open answers (multiple choice by its "
        "letter), or all.",
    )
    fusion: FusionConfig = Field(
        default_factory=lambda: FusionConfig(), description="What component 'fusion' compares."
    )
    custom_timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds a user-defined reward may take for one group."
    )
    judge: JudgeConfig = Field(
        default_factory=JudgeConfig, description="The judge, if 'judge' has a weight."
    )

    @property
    def quick(self) -> bool:
        """No component waits for an endpoint or runs code of the user: a group takes
        milliseconds."""
        return BUILTIN.keys() >= self.weights.keys() and not (
            self.asks_judge and self.judge.kind == "openai"
        )

    @property
    def asks_judge(self) -> bool:
        """Whether any component needs the judge."""
        return not JUDGED.isdisjoint(self.weights)

    @property
    def asks_unimodal(self) -> bool:
        """Whether any component compares with rollouts of video alone and of audio alone (three
        times the work)."""
        return "fusion" in self.weights

    @property
    def asks_confidence(self) -> bool:
        """Whether the log-probability of the answers is needed."""
        return self.asks_unimodal and self.fusion.signal == "confidence"

    @property
    def full_reward(self) -> float:
        """The largest reward a completion can have."""
        best = {"overlong": 0.0, "fusion": ATTENTION_BONUS}
        return sum(weight * best.get(name, 1.0) for name, weight in self.weights.items())

    @model_validator(mode="before")
    @classmethod
    def _weights_of_stage(cls, raw: Json) -> Json:
        if isinstance(raw, dict) and "fusion_strict" in raw:
            raw = {**raw}
            strict, fusion = raw.pop("fusion_strict"), raw.get("fusion") or {}
            warn_once("rewards.fusion_strict", "rewards.fusion.strict")
            raw["fusion"] = {"strict": strict, **fusion} if isinstance(fusion, dict) else fusion
        stage = raw.get("stage") if isinstance(raw, dict) else None
        if not isinstance(raw, dict) or not isinstance(stage, int) or stage not in STAGE_WEIGHTS:
            return raw
        of_stage = STAGE_WEIGHTS[stage]
        if raw.get("weights") not in (None, of_stage):
            raise ConfigError(
                "rewards.stage and rewards.weights both say what is paid: keep one of them"
            )
        return {**raw, "weights": dict(of_stage)}

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        known = ", ".join(BUILTIN)
        for name, weight in weights.items():
            if name not in BUILTIN and not _IMPORT_PATH.fullmatch(name):
                raise ConfigError(
                    f"rewards.weights: unknown reward {name!r}; known are {known}, "
                    "or an import path like 'my_pkg.rewards:fn'"
                )
            if not math.isfinite(weight) or weight < 0:
                raise ConfigError(f"rewards.weights.{name} is {weight}: needs a finite number >= 0")
        if not sum(weights.values()) > 0:
            raise ConfigError(
                f"rewards.weights sum to 0 ({weights}): give at least one of {known} a weight "
                "above 0"
            )
        return weights
