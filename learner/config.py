"""Config sections of the learner. Imports neither torch nor DeepSpeed: a dry run must start at
once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from avatar_rl.common.config import Section, expanded
from avatar_rl.learner.lora_config import LoraConfig

#: A decay rate of AdamW's averages.
Beta = Annotated[float, Field(ge=0, lt=1)]
LossType = Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo"]
RatioLevel = Literal["token", "sequence", "sequence_plain"]
RewardScale = Literal["group", "batch", "none"]
FreshAdvantage = Literal["group", "vcrs"]
ReplaySign = Literal["both", "positive"]
ReplayAdvantage = Literal["vcrs", "batch_mean", "joint"]
TasShape = Literal["parabolic", "uniform", "linear_decay", "linear_incline", "inverse_parabolic"]
TasNormalize = Literal["none", "unit_mean"]
Schedule = Literal["constant", "linear", "cosine"]
DType = Literal["auto", "float32", "bfloat16"]
RouterMode = Literal["frozen", "trained", "balanced", "replay"]
MismatchCorrection = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]
OldLogprobs = Literal["auto", "behaviour", "trainer", "current"]
OldRule = Literal["behaviour", "trainer", "current"]
Rejection = Literal["none", "geometric", "k3"]
#: Threshold of a rejection where none is given.
REJECTION_THRESHOLD = {"geometric": 1.01, "k3": 0.01}
#: CPU threads of a rank where a recipe leaves it open: rollouts want cores, too.
MOST_THREADS = 4
#: Tokens of a pack where nothing longer has to fit.
PACK_TOKENS = 16_384


class ObjectiveConfig(Section):
    """What the learner minimises (docs/method.md 1.1, 1.2, 2.3, 3); the defaults are AVATAR's."""

    loss_type: LossType = Field(
        "grpo",
        description="Average over tokens: grpo = per sequence, then over sequences; dapo, bnpo "
        "and cispo = over all tokens of the step; dr_grpo = sum over sequences x the longest "
        "completion allowed.",
    )
    ratio: RatioLevel = Field(
        "token",
        description="Importance ratio: token; sequence = GSPO-token (one value per sequence, "
        "gradient per token); sequence_plain = GSPO as first written, which cannot carry weights "
        "that vary by token.",
    )
    epsilon: float = Field(
        0.2, gt=0, lt=1, description="Clip range below 1, and above it when epsilon_high is null."
    )
    epsilon_high: float | None = Field(
        None,
        gt=0,
        description="Clip range above 1 (clip higher); for cispo the cap on the ratio is 1 + this.",
    )
    delta: float | None = Field(
        None,
        gt=1,
        description="Dual clip: largest ratio used with a negative advantage; must exceed 1 + "
        "epsilon_high.",
    )
    alpha: float = Field(
        0.6,
        ge=0,
        description="Weight of the replayed surrogate; the KL term is never scaled by it.",
    )
    beta: float = Field(
        0.1, ge=0, description="Weight of the k3 KL to the reference policy; 0 needs no reference."
    )
    scale_rewards: RewardScale = Field(
        "group",
        description="Fresh advantages are divided by the deviation of the group, of the batch, or "
        "by nothing.",
    )
    replay_advantage: ReplayAdvantage = Field(
        "vcrs",
        description="Baseline of a replayed trajectory: vcrs = moving average of its prompt's "
        "on-policy rewards; batch_mean = mean of the replayed batch (ablation); joint = "
        "normalised with the fresh group of its prompt.",
    )
    fresh_advantage: FreshAdvantage = Field(
        "group",
        description="Baseline of a fresh completion: group = mean of its group, divided by "
        "scale_rewards; vcrs = the moving average of its prompt, divided by the deviation of the "
        "step's rewards. With vcrs one completion is a group, and a group of equal rewards still "
        "teaches.",
    )
    replay_sign: ReplaySign = Field(
        "both",
        description="positive trains only on replays better than their baseline (self-imitation).",
    )
    tas_shape: TasShape = Field(
        "parabolic", description="Temporal advantage shaping: weight against token position."
    )
    tas_lambda: float = Field(0.3, ge=0, description="Strength of the shaping; 0 switches it off.")
    tas_normalize: TasNormalize = Field(
        "none",
        description="unit_mean divides the weights of each sequence by their mean, so that shapes "
        "compare.",
    )
    mask_truncated_completions: bool = Field(
        False,
        description="Completions that hit the length limit give no gradient; they still count as "
        "sequences.",
    )
    old_logprobs: OldLogprobs = Field(
        "auto",
        description="What the ratio is taken against. behaviour: the sampler's stored "
        "log-probabilities; trainer: for fresh completions the trainer's own at the start of the "
        "step, replays as with behaviour; current: the policy before each update, for both; auto: "
        "trainer where the ratio is per sequence, the engine runs below float32 or a rejection is "
        "set, else behaviour.",
    )
    mismatch: MismatchCorrection = Field(
        "token_truncate",
        description="Importance weight old / behaviour without gradient where old_logprobs is not "
        "the behaviour's: per token or per sequence, truncated at the bounds or zeroed outside "
        "them. Elsewhere it is 1.",
    )
    mismatch_cap: float = Field(2.0, gt=0, description="Upper bound of the mismatch weight.")
    mismatch_floor: float | None = Field(
        None, ge=0, description="Lower bound of the mismatch weight; null = none."
    )
    rejection: Rejection = Field(
        "none",
        description="Completions on which trainer and sampler differ too much give no policy "
        "gradient: geometric = mean log-ratio old / behaviour beyond +-log(threshold); k3 = mean "
        "k3 of the two above it.",
    )
    rejection_threshold: float | None = Field(
        None,
        gt=0,
        description="Bound of the rejection: a factor above 1 for geometric (null: 1.01), nats a "
        "token for k3 (null: 0.01).",
    )

    @property
    def upper(self) -> float:
        """Clip range above 1, resolved."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def rejects_above(self) -> float:
        """The bound of ``rejection``, resolved; infinite without one."""
        if self.rejection == "none":
            return math.inf
        given = self.rejection_threshold
        return REJECTION_THRESHOLD[self.rejection] if given is None else given

    def old_rule(self, engine_dtype: str) -> OldRule:
        """``old_logprobs``, resolved for an engine of this dtype (docs/method.md 1.1)."""
        if self.old_logprobs != "auto":
            return self.old_logprobs
        is_exact = self.ratio == "token" and engine_dtype == "float32"
        return "behaviour" if is_exact and self.rejection == "none" else "trainer"

    @property
    def shapes_tokens(self) -> bool:
        """Whether TAS weights differ within a sequence."""
        return self.tas_shape != "uniform" and self.tas_lambda > 0

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.ratio == "sequence_plain" and self.shapes_tokens:
            raise ValueError(
                "ratio: sequence_plain averages the token weights of TAS away: use ratio: "
                "sequence, or tas_lambda: 0"
            )
        if self.delta is not None and self.delta <= 1 + self.upper:
            raise ValueError(
                f"delta {self.delta} must exceed 1 + epsilon_high = {1 + self.upper}, or be null"
            )
        if self.delta is not None and self.loss_type == "cispo":
            raise ValueError(
                "cispo caps every ratio by epsilon_high and has no dual clip: set delta to null"
            )
        if self.mismatch_floor is not None and self.mismatch_floor > self.mismatch_cap:
            raise ValueError(
                f"mismatch_floor {self.mismatch_floor} exceeds mismatch_cap {self.mismatch_cap}"
            )
        if self.rejection != "none" and self.old_logprobs == "behaviour":
            raise ValueError(
                f"rejection: {self.rejection} compares old_logprobs with the behaviour policy: set "
                "old_logprobs to auto or trainer"
            )
        if self.rejection == "geometric" and self.rejects_above <= 1:
            raise ValueError(
                f"rejection_threshold {self.rejects_above} must exceed 1: geometric keeps mean "
                "ratios between 1/threshold and threshold"
            )
        return self


class OptimizerConfig(Section):
    """AdamW under DeepSpeed."""

    lr: float = Field(5e-7, gt=0, description="Peak learning rate.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay of matrices; vectors get none."
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradients are clipped to this global norm."
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="Parameters whose name holds one of these words keep their weights: visual, "
        "audio_tower, ...",
    )
    dtype: DType = Field(
        "auto", description="Weights and activations; auto is bfloat16 on a GPU, float32 on a CPU."
    )
    zero_stage: int = Field(0, ge=0, le=3, description="DeepSpeed ZeRO stage.")
    offload_optimizer: bool = Field(
        False, description="Keep optimiser state in CPU memory (ZeRO 1 to 3)."
    )

    accumulate_in_float32: bool = Field(
        False,
        description="Add up gradients of packs and ranks in float32 where weights are bfloat16 "
        "(ZeRO 1 to 3): 2 bytes more per trained parameter, and twice the traffic. Of use beyond "
        "some 64 packs a rank.",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.accumulate_in_float32 and self.zero_stage == 0:
            raise ValueError(
                "accumulate_in_float32 needs zero_stage 1, 2 or 3: DeepSpeed has no other buffer "
                "for the sums"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class EmbeddingsConfig(Section):
    """Frozen towers run once per medium; what they made of it is kept on the node's disk."""

    mode: Literal["auto", "on", "off", "pixels"] = Field(
        "auto",
        description="auto stores embeddings where every vision and audio tower is frozen "
        "(learner.optimizer.freeze), and says why where it cannot; on refuses such a run; off runs "
        "the towers in every step; pixels does so, too, but workers decode and process media ahead "
        "of it, as auto does on a GPU where a tower trains.",
    )
    folder: Path | None = Field(
        None,
        description="Folder on the node's own disk, shared by the processes and runs of this user; "
        "null is below TMPDIR.",
    )
    bytes: int = Field(
        32 << 30,
        ge=0,
        description="Upper bound of that folder, in bytes; the least recently used leaves first.",
    )
    workers: int = Field(
        1,
        ge=0,
        description="Processes per rank that decode and encode media ahead of the step, each with "
        "its own copy of the towers; 0 does it in the rank, while the step waits.",
    )

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: Path | None) -> Path | None:
        """Workers start in other folders."""
        return None if folder is None else Path(expanded(folder)).absolute()


class LearnerConfig(Section):
    """The learner's rank group."""

    REMOVED: ClassVar[Mapping[str, str]] = {
        "share_prefix": "each prompt is always computed once per pack, with gradient_checkpointing "
        "too; delete the line",
    }

    ranks: int = Field(
        1, ge=1, description="Learner processes, one per GPU; each step is split over them."
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Ranks that share each pack, a slice of its positions each: activations of a "
        "long pack divide by it. Must divide ranks and the model's attention heads. A cold start "
        "does without.",
    )
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="What is minimised.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and DeepSpeed.")
    lora: LoraConfig | None = Field(
        None, description="Train LoRA adapters beside a frozen model; null trains the model."
    )
    updates: int = Field(
        1,
        ge=1,
        description="Optimiser updates per step: each trains on the step's fresh groups and on "
        "its own share of the replays, of which the step draws this many times as many.",
    )
    skip_dead: bool = Field(
        True,
        description="Leave completions with an advantage of 0 out of the update where they cannot "
        "change the gradient: beta 0, no balanced routers, no hints. Metrics of tokens are then of "
        "the others.",
    )
    warmup: float = Field(
        0.05, ge=0, le=1, description="Share of the steps with a rising learning rate."
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="The same as a number of steps; null takes the share. A run that is resumed "
        "keeps the number it began with, also when loop.steps is raised.",
    )
    schedule: Schedule = Field("constant", description="Learning rate after the warm-up.")
    micro_batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens computed at once, no padding among them: a pack of prompts, each once, "
        "and their completions. Must hold the longest prompt with one completion; null is 16,384, "
        "or what these need.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    embeddings: EmbeddingsConfig = Field(
        EmbeddingsConfig(), description="Media through frozen towers, once."
    )
    router: RouterMode = Field(
        "frozen",
        description="Of mixtures of experts: frozen keeps the routers' weights, trained lets them "
        "learn, balanced does so with an auxiliary loss that spreads tokens over the experts, "
        "replay lets them learn while completions take the experts that they took in the engine.",
    )
    router_balance: float = Field(
        1e-3, ge=0, description="Weight of that loss; read with `router: balanced` only."
    )
    reference_cache: int = Field(
        20_000,
        ge=0,
        description="Trajectories whose reference log-probs are remembered, by every rank and in "
        "checkpoints.",
    )
    max_skipped: int = Field(
        10,
        ge=0,
        description="NaN losses (a micro-batch is left out) and NaN gradients (an update is) "
        "before the run stops.",
    )
    lease_s: float = Field(
        600, gt=0, description="Seconds until the groups of a silent learner are given away."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads per rank; null: the machine's cores over its ranks, at most 4. "
        "Ignored on a GPU.",
    )

    def threads_of(self, ranks: int) -> int:
        """CPU threads of each of ``ranks`` ranks on this machine."""
        share = (os.cpu_count() or 1) // ranks
        return self.threads or max(1, min(MOST_THREADS, share))

    def pack_tokens(self, longest: int = 0) -> int:
        """Budget of a pack; ``longest`` is a prompt with one completion."""
        return self.micro_batch_tokens or max(PACK_TOKENS, longest)

    def _check_towers(self) -> None:
        """What can be said of towers before the model is known; the rank looks at all names."""
        if self.lora is not None and self.lora.encoder_targets:
            raise ValueError(
                f"embeddings.mode: on needs frozen towers, but lora.targets has "
                f"{', '.join(self.lora.encoder_targets)}: leave them out, or set embeddings.mode "
                "to auto or off"
            )
        if self.lora is None and not self.optimizer.freeze:
            raise ValueError(
                "embeddings.mode: on needs frozen towers, but optimizer.freeze is empty: add "
                "visual and audio_tower to it, or set embeddings.mode to auto or off"
            )

    def rising(self, steps: int) -> int:
        """Steps of a run of ``steps`` with a rising learning rate."""
        return round(self.warmup * steps) if self.warmup_steps is None else self.warmup_steps

    def _check_sequence(self) -> None:
        """What sequence parallelism needs; recipe/assets.py looks at the model's heads."""
        size, ranks = self.sequence_parallel, self.ranks
        if ranks % size:
            fitting = ", ".join(str(n) for n in range(1, ranks + 1) if not ranks % n)
            raise ValueError(
                f"sequence_parallel {size} does not divide ranks {ranks}: set it to one of "
                f"{fitting}, or ranks to a multiple of {size}"
            )
        if size > 1 and self.router == "balanced":
            raise ValueError(
                f"sequence_parallel {size} and router: balanced exclude each other: the auxiliary "
                "loss needs all tokens of a pack on one rank; set router to frozen or trained, or "
                "sequence_parallel to 1"
            )

    @model_validator(mode="after")
    def _check(self) -> LearnerConfig:
        self._check_sequence()
        if self.embeddings.mode == "on":
            self._check_towers()
        if self.gradient_checkpointing and self.lora is not None and self.lora.dropout:
            raise ValueError(
                "lora.dropout above 0 and gradient_checkpointing exclude each other: what is "
                "computed again would drop other numbers; set lora.dropout to 0"
            )
        return self


class SftOptimizerConfig(OptimizerConfig):
    """AdamW and DeepSpeed of a cold start."""

    lr: float = Field(1e-5, gt=0, description="Peak learning rate.")


class SftConfig(Section):
    """Stage 0: supervised cold start (docs/method.md 1.6)."""

    steps: int = Field(ge=1, le=1_000_000_000, description="Optimiser steps.")
    batch_size: int = Field(32, ge=1, description="Prompts per step, over all ranks.")
    optimizer: SftOptimizerConfig = Field(SftOptimizerConfig(), description="AdamW and DeepSpeed.")
    lora: LoraConfig | None = Field(
        None,
        description="Train LoRA adapters beside a frozen model, and merge them at the end; null "
        "trains the model.",
    )
    warmup: int = Field(50, ge=0, description="Steps with a rising learning rate.")
    schedule: Schedule = Field("linear", description="Learning rate after the warm-up.")
    lr_floor: float = Field(
        0.02, ge=0, le=1, description="Last learning rate as a share of the peak."
    )
    ranks: int = Field(1, ge=1, description="Learner processes during the cold start.")
    micro_batch_tokens: int = Field(
        16_384,
        ge=16,
        description="Tokens computed at once; must hold the longest prompt with its completion.",
    )
    seed: int = Field(0, ge=0, description="Order of the prompts.")
    checkpoint_every: int = Field(
        100,
        ge=0,
        description="Steps between checkpoints that an interrupted cold start resumes from; 0 "
        "writes none.",
    )
    ready: Path | None = Field(
        None,
        description="Folder of the finished cold start of a recipe with the tiny model. It is "
        "taken instead of training one where these settings, the template and the world are those "
        "it was made with; null always trains.",
    )
