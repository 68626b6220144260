"""The run's configuration: each package's own section, composed. Nothing here imports torch, Ray or
vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from avatar_rl.actors.config import CPU_SEQUENCES, EngineConfig, SamplingConfig
from avatar_rl.actors.groups import MAX_PARTS, DeadBy
from avatar_rl.buffer_service.config import BufferConfig, WeightsConfig
from avatar_rl.cluster.model_config import ModelSection, adapter_faults
from avatar_rl.cluster.upkeep_config import (
    CheckpointConfig as CheckpointConfig,
)
from avatar_rl.cluster.upkeep_config import (
    OutputConfig as OutputConfig,
)
from avatar_rl.cluster.upkeep_config import (
    ProbeConfig as ProbeConfig,
)
from avatar_rl.cluster.upkeep_config import (
    ResourceConfig as ResourceConfig,
)
from avatar_rl.cluster.upkeep_config import (
    SupervisionConfig as SupervisionConfig,
)
from avatar_rl.common.config import Section
from avatar_rl.learner.config import LearnerConfig, SftConfig
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig
from avatar_rl.prompts.selection import SelectionConfig
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.rewards.config import RewardConfig

#: Below these a completion is the likeliest one, but for ties.
LEAST_TEMPERATURE = 0.01
LEAST_TOP_P = 0.01


class DataSection(Section):
    """What is asked. With ``synthetic`` the files are made on the spot and the paths are left
    out."""

    train: Path | None = Field(None, description="Training prompts (file or datasets folder).")
    heldout: Path | None = Field(
        None, description="Held-out prompts for evaluation; null switches evaluation off."
    )
    sft: Path | None = Field(
        None, description="Cold-start prompts with reasoning; needed when cold_start is set."
    )
    synthetic: WorldConfig | None = Field(
        None, description="Settings of the synthetic audio-visual world."
    )
    reader: DataConfig = Field(DataConfig(), description="How dataset rows become prompts.")
    select: SelectionConfig = Field(
        SelectionConfig(),
        description="Which training prompts are asked; held-out evaluation keeps all types.",
    )
    media: MediaConfig = Field(
        MediaConfig(), description="Decoding limits and caches of each worker."
    )
    template: TemplateConfig = Field(
        TemplateConfig(), description="From prompt to tokens, the same on both sides."
    )

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.synthetic is None and self.train is None:
            raise ValueError("data needs `train: FILE` or a `synthetic:` section")
        if self.synthetic is not None and (self.train or self.heldout or self.sft):
            raise ValueError("data has both `synthetic` and dataset files: keep one")
        return self


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling: a group that teaches nothing gives way to another prompt's
    (docs/objective.md). Everything that is generated counts as generated."""

    attempts: int = Field(
        1,
        ge=1,
        le=64,
        description="Most prompts asked for one group of a step; the last is trained whatever it "
        "is. 1 switches it off.",
    )
    by: DeadBy = Field(
        "accuracy",
        description="What is alike in all completions of a group that is replaced: accuracy (the "
        "reward where it is unknown) or reward.",
    )


class LoopConfig(Section):
    """The training loop and its flow control, in policy versions (docs/architecture.md)."""

    steps: int = Field(
        100,
        ge=1,
        le=1_000_000_000,
        description="Optimiser steps, each from `prompts_per_step` groups.",
    )
    prompts_per_step: int = Field(8, ge=1, description="Groups per step, over all learner ranks.")
    fresh: int = Field(4, ge=1, description="Completions generated per prompt once replay is warm.")
    replayed: int = Field(
        4, ge=0, description="Stored trajectories trained on per group; 0 switches replay off."
    )
    max_staleness: int = Field(
        1,
        ge=0,
        description="Policy versions by which generation may run ahead of learning; 0 alternates "
        "exactly.",
    )
    step_timeout_s: float = Field(
        600, gt=0, description="The run stops when a step's groups take longer than this."
    )
    target_accuracy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Stop early once held-out accuracy on the selected types reaches this; null "
        "runs all steps.",
    )
    replay_from: Path | None = Field(
        None,
        description="Exported trajectories (.jsonl, .parquet) that are replayable from the first "
        "step on.",
    )
    schedule: Literal["epochs", "open"] = Field(
        "epochs",
        description="Which prompts are asked: epochs = every prompt in turn, shuffled; open = "
        "prompts never asked first, then drawn by how far their moving average is from a full "
        "reward.",
    )
    dynamic_sampling: DynamicSamplingConfig = Field(
        DynamicSamplingConfig(), description="Groups that teach nothing are replaced."
    )

    @property
    def group_size(self) -> int:
        return self.fresh + self.replayed

    def fresh_at(self, step: int, warm_up: int) -> int:
        """Completions generated per prompt of ``step``: the whole group until replay is warm
        (docs/method.md 1.3)."""
        if self.replayed == 0:
            return self.fresh
        return (
            self.group_size
            if step * self.prompts_per_step * self.group_size < warm_up
            else self.fresh
        )


class PoolEvaluationConfig(Section):
    """Accuracy over the training prompts, each asked equally often.

    The running accuracy of the fresh completions depends on which prompts the schedule asks; this
    one does not. Training waits for it.
    """

    every: int = Field(0, ge=0, description="Steps between measurements; 0 switches them off.")
    samples: int = Field(
        4, ge=1, description="Completions per prompt, sampled as in training; 1 is greedy."
    )
    stop_at: float | None = Field(
        None, gt=0, le=1, description="Training ends once the accuracy is at least this."
    )


class PublicSetsConfig(Section):
    """Public benchmarks that a run is measured on (docs/evaluation.md). Training waits for them, so
    they change nothing of it."""

    names: tuple[str, ...] = Field(
        (), description="Sets by name (`avatar evaluate MODEL --benchmark list`); none: off."
    )
    sets: Path | None = Field(
        None, description="Folder that holds a folder of each set, as it was downloaded."
    )
    every: int = Field(
        0, ge=0, description="Steps between measurements; 0 measures only before and after."
    )
    limit: int | None = Field(
        None, ge=1, description="Questions of each set, evenly chosen; null asks all."
    )
    wording: Literal["recipe", "official"] = Field(
        "recipe", description="Asked in the recipe's template, or in the words of its authors."
    )
    skip_missing: bool = Field(
        False, description="Leave questions out whose media are not there, instead of refusing."
    )

    @model_validator(mode="after")
    def _check(self) -> PublicSetsConfig:
        if self.names and self.sets is None:
            raise ValueError("names needs `sets: FOLDER`, which holds a folder of each set")
        return self


class EvaluationConfig(Section):
    """Held-out accuracy, measured on the rollout actors while training continues."""

    every: int = Field(
        25, ge=0, description="Steps between evaluations; 0 evaluates only before and after."
    )
    limit: int | None = Field(
        None, ge=1, description="Use only the first N held-out prompts; null uses all."
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Completion length; null takes the rollout's."
    )
    timeout_s: float = Field(600, gt=0, description="Deadline of one evaluation.")
    pool: PoolEvaluationConfig = Field(
        PoolEvaluationConfig(), description="Accuracy over the training prompts."
    )
    benchmarks: PublicSetsConfig = Field(
        PublicSetsConfig(), description="Public benchmarks asked in the course of the run."
    )


class RolloutSection(Section):
    """The rollout pool."""

    workers: int = Field(
        1, ge=1, description="vLLM engines (Ray actors) at start; `avatar scale` changes it."
    )
    min_workers: int = Field(1, ge=1, description="Fewest that scaling may leave.")
    max_workers: int | None = Field(
        None, ge=1, description="Most that scaling may start; null: as many as are placed."
    )
    autoscale: bool = Field(
        False,
        description="Grow by one while the learner waits, shrink while rollouts wait; needs "
        "max_workers.",
    )
    drain_s: float = Field(
        60, gt=0, description="Seconds a leaving actor may take to finish what it has begun."
    )
    lora: Literal["adapter", "merged"] = Field(
        "adapter",
        description="What rollouts take of a version when learner.lora is set. adapter: the "
        "adapter itself, a few percent of the bytes; completions under way end with the one they "
        "began with, and nothing is prefilled again. merged: whole weights. Adapters on towers or "
        "projectors are always merged, which the run says.",
    )
    stored_embeddings: bool = Field(
        False,
        description="Take what the learner's store (learner.embeddings) has of a medium on an "
        "actor's node in the place of a tower's run; the rest is computed. Needs frozen towers.",
    )
    engine: EngineConfig = Field(EngineConfig(), description="vLLM engine settings.")
    sampling: SamplingConfig = Field(SamplingConfig(), description="How completions are sampled.")
    max_sequences: int | None = Field(
        None,
        ge=1,
        description="Completions one actor keeps in flight; null is 256 on a GPU, 64 on a CPU.",
    )
    lease_s: float = Field(
        120, gt=0, description="Seconds until an unfinished prompt of a silent actor is given away."
    )

    def bounded(self, workers: int) -> int:
        """The nearest pool size that the recipe allows."""
        return max(
            self.min_workers,
            workers if self.max_workers is None else min(workers, self.max_workers),
        )

    @model_validator(mode="after")
    def _check(self) -> RolloutSection:
        if self.bounded(self.workers) != self.workers:
            raise ValueError(
                f"workers {self.workers} is outside min_workers {self.min_workers} to max_workers "
                f"{self.max_workers}"
            )
        if self.autoscale and self.max_workers is None:
            raise ValueError("autoscale needs max_workers: say how far the pool may grow")
        return self


class RunConfig(Section):
    """One recipe."""

    name: str = Field(
        "avatar",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="Prefix of the run id.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=1 << 32,
        description="Seeds prompt order, sampling, replay draws and the synthetic world.",
    )
    preset: str | None = Field(
        None, description="Named overlay (see `avatar presets`), below the recipe's own keys."
    )
    model: ModelSection = Field(ModelSection(), description="Which policy is trained.")
    data: DataSection = Field(description="What is asked.")
    loop: LoopConfig = Field(LoopConfig(), description="Steps, group sizes and flow control.")
    cold_start: SftConfig | None = Field(
        None, description="Stage 0 supervised fine-tuning before RL, cached."
    )
    rollout: RolloutSection = Field(RolloutSection(), description="The rollout pool.")
    weights: WeightsConfig = Field(
        WeightsConfig(), description="How versions travel to the rollouts."
    )
    rewards: RewardConfig = Field(RewardConfig(), description="Reward components and weights.")
    buffer: BufferConfig = Field(BufferConfig(), description="The replay buffer service.")
    learner: LearnerConfig = Field(
        LearnerConfig(), description="Objective, optimiser and DeepSpeed."
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Held-out evaluation.")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), description="Checkpoints and the learner's copy."
    )
    supervision: SupervisionConfig = Field(SupervisionConfig(), description="Who is replaced when.")
    probe: ProbeConfig = Field(ProbeConfig(), description="Parity probe at start.")
    resources: ResourceConfig = Field(ResourceConfig(), description="What is asked of Ray.")
    output: OutputConfig = Field(OutputConfig(), description="What the run leaves behind.")
    screen: Literal["auto", "live", "plain"] = Field(
        "auto", description="Live view or one line per step."
    )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        faults = [
            *self._unmet(),
            *self._colocated(),
            *self._transport(),
            *self._lengths(),
            *self._nothing_to_learn(),
        ]
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    def _unmet(self) -> Iterator[str]:
        """Keys that need another key."""
        if self.cold_start is not None and self.data.synthetic is None and self.data.sft is None:
            yield "cold_start needs `data.sft: FILE` (prompts with reasoning)"
        if self.loop.target_accuracy is not None and self.evaluation.every == 0:
            yield "loop.target_accuracy is checked at evaluations: set evaluation.every above 0"
        split, gpus = self.rollout.engine.tensor_parallel_size, self.resources.rollout_gpus
        if split > 1 and gpus != split and self.rollout.engine.device != "cpu":
            yield (
                f"rollout.engine.tensor_parallel_size {split} needs resources.rollout_gpus "
                f"{split}, which is {gpus}"
            )
        largest = self.loop.group_size if self.loop.replayed else self.loop.fresh
        measured = self.evaluation.pool.samples if self.evaluation.pool.every else 0
        what = " (evaluation.pool.samples)" if measured > largest else ""
        largest = max(largest, measured)  # an actor without room for it would lease nothing more
        if self.rewards.asks_unimodal:
            largest *= MAX_PARTS
            what += " (fusion: with video alone and audio alone)"
        fewest = self.rollout.max_sequences or CPU_SEQUENCES
        if fewest < largest:
            yield f"rollout.max_sequences {fewest} is below one group of {largest}{what}"
        yield from self._quantised()
        yield from adapter_faults(self.learner.lora, self.rollout.lora, self.rollout.engine.vllm)

    def _quantised(self) -> Iterator[str]:
        """Rollouts in FP8 sample from another policy than the one that learns."""
        kind = self.rollout.engine.quantization
        objective = self.learner.objective
        if kind is not None and objective.old_rule("bfloat16") == "behaviour":
            yield (
                f"rollout.engine.quantization {kind} needs a correction of the mismatch: set "
                "learner.objective.old_logprobs to auto, which weights by "
                "learner.objective.mismatch"
            )
        if kind is not None and self.probe.prompts and self.probe.tolerance is None:
            yield (
                f"rollout.engine.quantization {kind}: engine and learner differ by more than in "
                "bfloat16. Set probe.tolerance (docs/objective.md)"
            )

    def _colocated(self) -> Iterator[str]:
        """What cannot be where rollout actors and learner take turns on the same devices."""
        resources, rollout, engine = self.resources, self.rollout, self.rollout.engine
        if not resources.colocate:
            return
        if self.loop.max_staleness > 0:
            yield (
                "resources.colocate alternates generation and training, and loop.max_staleness "
                f"{self.loop.max_staleness} lets generation run ahead: set it to 0"
            )
        if resources.machine is not None and resources.machine.nodes > 1:
            yield (
                f"resources.colocate is for one node, and resources.machine has "
                f"{resources.machine.nodes}: set colocate to false, or machine.nodes to 1"
            )
        if engine.kv_cache_memory_bytes is None:
            yield (
                "resources.colocate needs rollout.engine.kv_cache_memory_bytes: an engine that "
                "measures free memory would take what the learner needs; `--dry-run` prints the "
                "plan"
            )
        if rollout.autoscale or rollout.max_workers not in (None, rollout.workers):
            yield (
                "resources.colocate has a rollout actor for each device and cannot scale: leave "
                "rollout.autoscale and rollout.max_workers out"
            )
        if engine.tensor_parallel_size > 1 and engine.device != "cpu":
            yield (
                f"resources.colocate with rollout.engine.tensor_parallel_size "
                f"{engine.tensor_parallel_size}: an engine over several GPUs cannot share them, "
                "set it to 1"
            )
        named = {"rollout_gpus": resources.rollout_gpus, "learner_gpus": resources.learner_gpus}
        for name, amount in named.items():
            if amount:
                yield (
                    f"resources.colocate gives each actor its share of a GPU: leave resources."
                    f"{name} {amount:g} out (0 keeps it on the CPU)"
                )
        if resources.rollout_labels not in ({}, resources.learner_labels):
            yield (
                "resources.colocate puts rollout actors beside the learner: leave "
                "resources.rollout_labels out, learner_labels count for both"
            )

    def _transport(self) -> Iterator[str]:
        """What a way of the weights needs, as far as the recipe tells."""
        resources = self.resources
        return self.weights.faults(
            lacks_gpus=self.rollout.engine.device == "cpu"
            or 0 in (resources.rollout_gpus, resources.learner_gpus),
            colocated=resources.colocate,
            max_staleness=self.loop.max_staleness,
            measures_pool=self.evaluation.pool.every > 0,
        )

    @property
    def pack_tokens(self) -> int:
        """Tokens that the learner computes at once."""
        tokens = self.rollout.sampling.max_tokens
        return self.learner.pack_tokens(self.data.template.max_prompt_tokens + tokens)

    def _lengths(self) -> Iterator[str]:
        """The longest prompt and a whole completion must fit into the engine and into a pack."""
        longest = self.rollout.engine.max_model_len
        prompt = self.data.template.max_prompt_tokens
        for name, tokens in (
            ("rollout.sampling.max_tokens", self.rollout.sampling.max_tokens),
            ("evaluation.max_tokens", self.evaluation.max_tokens or 0),
        ):
            if prompt + tokens > longest:
                yield (
                    f"data.template.max_prompt_tokens {prompt} + {name} {tokens} exceed "
                    f"rollout.engine.max_model_len {longest}: raise max_model_len to "
                    f"{prompt + tokens}, or lower one of the others"
                )
        budget, tokens = self.pack_tokens, self.rollout.sampling.max_tokens
        if prompt + tokens > budget:
            yield (
                f"data.template.max_prompt_tokens {prompt} + rollout.sampling.max_tokens {tokens} "
                f"exceed learner.micro_batch_tokens {budget}, and a prompt with one completion is "
                f"never split: raise micro_batch_tokens to {prompt + tokens}, or lower one of the "
                "others"
            )

    def _nothing_to_learn(self) -> Iterator[str]:
        """Something must give completions an advantage other than 0 (docs/method.md 1.1, 1.2)."""
        objective = self.learner.objective
        sampling = self.rollout.sampling
        alike = {
            f"temperature {sampling.temperature:g}": (
                sampling.temperature < LEAST_TEMPERATURE,
                f"{LEAST_TEMPERATURE:g}",
            ),
            f"top_k {sampling.top_k}": (sampling.top_k == 1, "1"),
            f"top_p {sampling.top_p:g}": (sampling.top_p < LEAST_TOP_P, f"{LEAST_TOP_P:g}"),
        }
        for what, (is_so, least) in alike.items():
            if is_so:
                yield (
                    f"rollout.sampling.{what} makes the completions of a prompt equal, and all "
                    f"advantages 0: set it above {least} (evaluation is greedy by itself)"
                )
        if self.loop.dynamic_sampling.attempts > 1 and (
            objective.fresh_advantage == "vcrs" or self.loop.fresh == 1
        ):
            yield (
                "loop.dynamic_sampling replaces groups whose completions are all alike: with "
                "loop.fresh 1 every group is, and with learner.objective.fresh_advantage vcrs they "
                "teach all the same; set loop.dynamic_sampling.attempts to 1"
            )
        replays = self.loop.replayed > 0 and objective.alpha > 0
        if self.loop.fresh == 1 and objective.fresh_advantage == "group" and not replays:
            yield (
                "loop.fresh 1 with learner.objective.fresh_advantage group gives every completion "
                "the advantage 0: set loop.fresh to 2 or more, fresh_advantage to vcrs, or replay "
                "(loop.replayed and learner.objective.alpha above 0)"
            )
