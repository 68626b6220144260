"""What keys of TRL, verl and ms-swift are called here.

Names were looked up in TRL 1.16 (``GRPOConfig``), verl's generated trainer configuration and
ms-swift's page of command-line parameters. docs/other-frameworks.md is made of these tables
(``page``); a test keeps it equal.
"""

from __future__ import annotations

from dataclasses import dataclass

TRL, VERL, SWIFT, COMMON = "TRL", "verl", "ms-swift", "other programs"


@dataclass(frozen=True)
class Counterpart:
    """What takes the place of another framework's key; ``key`` is empty where nothing does."""

    framework: str
    name: str
    key: str
    note: str = ""

    def __str__(self) -> str:
        what = f"{self.framework}'s {self.name}"
        if self.framework == COMMON:
            what = f"what other programs call {self.name}"
        if not self.key:
            return f"{what} has no counterpart here: {self.note}"
        return f"{what} is {self.key} here" + (f" ({self.note})" if self.note else "")


_GROUPS = "a step is prompts times (fresh + replayed) completions; micro-batches are cut by tokens"
_EPOCHS = "a run is counted in steps; steps x prompts_per_step over the dataset's size are epochs"
_HALF_OFF = "0 evaluates only before and after"
_STARTED = "`avatar train RECIPE --resume auto`, or `avatar runs resume RUN`"

#: Of transformers' TrainingArguments and GRPOConfig, which ms-swift takes over.
_SHARED: tuple[tuple[str, str, str], ...] = (
    ("learning_rate", "learner.optimizer.lr", ""),
    ("lr_scheduler_type", "learner.schedule", "constant, linear or cosine"),
    ("warmup_ratio", "learner.warmup", "share of the steps"),
    ("warmup_steps", "learner.warmup_steps", ""),
    ("weight_decay", "learner.optimizer.weight_decay", ""),
    ("adam_beta1", "learner.optimizer.betas", "both in a list"),
    ("adam_beta2", "learner.optimizer.betas", "both in a list"),
    ("adam_epsilon", "learner.optimizer.eps", ""),
    ("max_grad_norm", "learner.optimizer.max_grad_norm", ""),
    ("bf16", "learner.optimizer.dtype", "bfloat16, float32 or auto"),
    ("fp16", "learner.optimizer.dtype", "bfloat16, float32 or auto"),
    ("gradient_checkpointing", "learner.gradient_checkpointing", ""),
    ("deepspeed", "learner.optimizer.zero_stage", "with offload_optimizer beside it"),
    ("max_steps", "loop.steps", ""),
    ("num_train_epochs", "loop.steps", _EPOCHS),
    ("per_device_train_batch_size", "loop.prompts_per_step", _GROUPS),
    ("gradient_accumulation_steps", "learner.micro_batch_tokens", _GROUPS),
    ("generation_batch_size", "loop.prompts_per_step", _GROUPS),
    ("steps_per_generation", "learner.updates", "optimiser steps per batch of groups"),
    ("num_iterations", "learner.updates", "optimiser steps per batch of groups"),
    ("num_generations", "loop.fresh", "beside loop.replayed stored ones"),
    ("max_completion_length", "rollout.sampling.max_tokens", ""),
    ("max_prompt_length", "data.template.max_prompt_tokens", "media tokens included"),
    ("temperature", "rollout.sampling.temperature", ""),
    ("top_p", "rollout.sampling.top_p", ""),
    ("top_k", "rollout.sampling.top_k", ""),
    ("beta", "learner.objective.beta", ""),
    ("epsilon", "learner.objective.epsilon", ""),
    ("epsilon_high", "learner.objective.epsilon_high", ""),
    ("delta", "learner.objective.delta", ""),
    ("loss_type", "learner.objective.loss_type", ""),
    ("importance_sampling_level", "learner.objective.ratio", "token or sequence"),
    ("scale_rewards", "learner.objective.scale_rewards", ""),
    ("mask_truncated_completions", "learner.objective.mask_truncated_completions", ""),
    ("reward_funcs", "rewards.weights", "name: weight, or an import path: weight"),
    ("reward_weights", "rewards.weights", "name: weight, or an import path: weight"),
    ("ref_model", "model.reference", ""),
    ("use_vllm", "", "rollouts always come from vLLM (rollout.engine)"),
    ("vllm_mode", "resources.colocate", "true for colocate, false for server"),
    ("vllm_gpu_memory_utilization", "rollout.engine.gpu_memory_utilization", ""),
    ("vllm_tensor_parallel_size", "rollout.engine.tensor_parallel_size", ""),
    ("seed", "seed", ""),
    ("output_dir", "output.folder", "runs are folders below it"),
    ("run_name", "name", ""),
    ("logging_steps", "", "every step is logged"),
    ("log_completions", "output.samples_every", ""),
    ("save_steps", "checkpoint.every", ""),
    ("save_total_limit", "checkpoint.keep", ""),
    ("eval_steps", "evaluation.every", _HALF_OFF),
    ("eval_strategy", "evaluation.every", _HALF_OFF),
    ("resume_from_checkpoint", "", _STARTED),
)

_TRL: tuple[tuple[str, str, str], ...] = (
    *_SHARED,
    ("model_name_or_path", "model.path", ""),
    ("dataset_name", "data.train", "a file or a saved datasets folder"),
    ("vllm_max_model_length", "rollout.engine.max_model_len", ""),
    ("vllm_importance_sampling_correction", "learner.objective.mismatch", ""),
    ("vllm_importance_sampling_mode", "learner.objective.mismatch", ""),
    ("vllm_importance_sampling_clip_max", "learner.objective.mismatch_cap", ""),
    ("vllm_importance_sampling_clip_min", "learner.objective.mismatch_floor", ""),
    ("use_peft", "learner.lora", "a section `lora: {}`; null trains all weights"),
    ("lora_r", "learner.lora.rank", ""),
    ("lora_alpha", "learner.lora.alpha", ""),
    ("lora_dropout", "learner.lora.dropout", ""),
    ("lora_target_modules", "learner.lora.targets", ""),
    ("use_rslora", "learner.lora.rslora", ""),
    ("num_completions_to_print", "output.samples", ""),
)

_SWIFT: tuple[tuple[str, str, str], ...] = (
    *_SHARED,
    ("model", "model.path", "a local folder"),
    ("dataset", "data.train", "ms-swift's JSONL is read as it is"),
    ("val_dataset", "data.heldout", ""),
    ("torch_dtype", "learner.optimizer.dtype", ""),
    ("sequence_parallel_size", "learner.sequence_parallel", ""),
    ("train_type", "learner.lora", "lora: a section `lora: {}`; full: null"),
    ("tuner_type", "learner.lora", "lora: a section `lora: {}`; full: null"),
    ("lora_rank", "learner.lora.rank", ""),
    ("lora_alpha", "learner.lora.alpha", ""),
    ("lora_dropout", "learner.lora.dropout", ""),
    ("target_modules", "learner.lora.targets", ""),
    ("use_rslora", "learner.lora.rslora", ""),
    ("freeze_vit", "learner.optimizer.freeze", "parts of parameter names, such as visual"),
    ("freeze_aligner", "learner.optimizer.freeze", "parts of parameter names"),
    ("max_length", "rollout.engine.max_model_len", ""),
    ("system", "data.template.system", ""),
    ("max_pixels", "data.template.max_pixels", ""),
    ("fps_max_frames", "data.media.max_frames", ""),
    ("vllm_max_model_len", "rollout.engine.max_model_len", ""),
    ("vllm_max_num_seqs", "rollout.engine.max_num_seqs", ""),
    ("vllm_enforce_eager", "rollout.engine.enforce_eager", ""),
    ("vllm_limit_mm_per_prompt", "rollout.engine.media_per_prompt", ""),
    ("overlong_filter", "learner.objective.mask_truncated_completions", ""),
    ("dynamic_sample", "loop.dynamic_sampling.attempts", "above 1 switches it on"),
    ("max_resample_times", "loop.dynamic_sampling.attempts", "for each place in a step"),
    ("soft_max_length", "rewards.overlong_tokens", "of the reward overlong"),
    ("soft_cache_length", "rewards.overlong_share", "as a share of that length"),
    ("rollout_importance_sampling_mode", "learner.objective.mismatch", ""),
    ("rollout_importance_sampling_threshold", "learner.objective.mismatch_cap", ""),
    ("async_generate", "loop.max_staleness", "above 0 generation runs ahead of learning"),
    ("offload_optimizer", "learner.optimizer.offload_optimizer", ""),
    ("sleep_level", "resources.colocate", "the engine sleeps in the learner's turn"),
    ("log_entropy", "", "the entropy is always logged"),
    ("reward_model", "rewards.judge.base_url", "a judge behind an OpenAI-compatible endpoint"),
)

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_VERL: tuple[tuple[str, str, str], ...] = (
    ("data.train_files", "data.train", "verl's parquet is read as it is"),
    ("data.val_files", "data.heldout", ""),
    ("data.max_prompt_length", "data.template.max_prompt_tokens", "media tokens included"),
    ("data.max_response_length", "rollout.sampling.max_tokens", ""),
    ("data.train_batch_size", "loop.prompts_per_step", ""),
    ("data.filter_overlong_prompts", "", "too long prompts are set aside and counted"),
    ("actor_rollout_ref.model.path", "model.path", "a local folder"),
    (
        "actor_rollout_ref.model.enable_gradient_checkpointing",
        "learner.gradient_checkpointing",
        "",
    ),
    ("actor_rollout_ref.model.lora_rank", "learner.lora.rank", ""),
    ("actor_rollout_ref.model.lora_alpha", "learner.lora.alpha", ""),
    ("actor_rollout_ref.model.target_modules", "learner.lora.targets", ""),
    (f"{_ACTOR}.optim.lr", "learner.optimizer.lr", ""),
    (f"{_ACTOR}.optim.lr_warmup_steps", "learner.warmup_steps", ""),
    (f"{_ACTOR}.optim.lr_warmup_steps_ratio", "learner.warmup", ""),
    (f"{_ACTOR}.optim.warmup_style", "learner.schedule", "constant, linear or cosine"),
    (f"{_ACTOR}.optim.weight_decay", "learner.optimizer.weight_decay", ""),
    (f"{_ACTOR}.grad_clip", "learner.optimizer.max_grad_norm", ""),
    (f"{_ACTOR}.ppo_mini_batch_size", "learner.updates", "optimiser steps per batch of groups"),
    (f"{_ACTOR}.ppo_epochs", "learner.updates", "optimiser steps per batch of groups"),
    (f"{_ACTOR}.ppo_micro_batch_size_per_gpu", "learner.micro_batch_tokens", "in tokens"),
    (f"{_ACTOR}.ppo_max_token_len_per_gpu", "learner.micro_batch_tokens", ""),
    (f"{_ACTOR}.use_dynamic_bsz", "", "micro-batches are always cut by tokens"),
    (f"{_ACTOR}.clip_ratio", "learner.objective.epsilon", ""),
    (f"{_ACTOR}.clip_ratio_low", "learner.objective.epsilon", ""),
    (f"{_ACTOR}.clip_ratio_high", "learner.objective.epsilon_high", ""),
    (f"{_ACTOR}.clip_ratio_c", "learner.objective.delta", ""),
    (f"{_ACTOR}.loss_agg_mode", "learner.objective.loss_type", "token-mean is dapo or bnpo"),
    (f"{_ACTOR}.policy_loss.loss_mode", "learner.objective.ratio", "gspo is sequence"),
    (f"{_ACTOR}.use_kl_loss", "learner.objective.beta", "0 switches it off"),
    (f"{_ACTOR}.kl_loss_coef", "learner.objective.beta", ""),
    (f"{_ACTOR}.fsdp_config.optimizer_offload", "learner.optimizer.offload_optimizer", ""),
    (f"{_ACTOR}.strategy", "learner.optimizer.zero_stage", "DeepSpeed in place of FSDP"),
    (f"{_ACTOR}.ulysses_sequence_parallel_size", "learner.sequence_parallel", ""),
    (f"{_ROLLOUT}.n", "loop.fresh", "beside loop.replayed stored ones"),
    (f"{_ROLLOUT}.name", "", "rollouts always come from vLLM (rollout.engine)"),
    (f"{_ROLLOUT}.mode", "", "rollouts are always asynchronous (loop.max_staleness)"),
    (f"{_ROLLOUT}.temperature", "rollout.sampling.temperature", ""),
    (f"{_ROLLOUT}.top_p", "rollout.sampling.top_p", ""),
    (f"{_ROLLOUT}.top_k", "rollout.sampling.top_k", ""),
    (f"{_ROLLOUT}.gpu_memory_utilization", "rollout.engine.gpu_memory_utilization", ""),
    (f"{_ROLLOUT}.tensor_model_parallel_size", "rollout.engine.tensor_parallel_size", ""),
    (f"{_ROLLOUT}.max_model_len", "rollout.engine.max_model_len", ""),
    (f"{_ROLLOUT}.max_num_seqs", "rollout.engine.max_num_seqs", ""),
    (f"{_ROLLOUT}.max_num_batched_tokens", "rollout.engine.max_num_batched_tokens", ""),
    (f"{_ROLLOUT}.enforce_eager", "rollout.engine.enforce_eager", ""),
    (f"{_ROLLOUT}.ignore_eos", "rollout.sampling.ignore_eos", ""),
    ("algorithm.adv_estimator", "preset", "`avatar presets` lists the methods"),
    ("algorithm.norm_adv_by_std_in_grpo", "learner.objective.scale_rewards", "group or none"),
    ("algorithm.filter_groups.enable", "loop.dynamic_sampling.attempts", "above 1"),
    ("algorithm.filter_groups.metric", "loop.dynamic_sampling.by", ""),
    ("algorithm.filter_groups.max_num_gen_batches", "loop.dynamic_sampling.attempts", ""),
    ("algorithm.use_kl_in_reward", "", "the KL is a term of the loss (learner.objective.beta)"),
    ("custom_reward_function.path", "rewards.weights", "an import path: weight"),
    ("custom_reward_function.name", "rewards.weights", "an import path: weight"),
    ("trainer.total_training_steps", "loop.steps", ""),
    ("trainer.total_epochs", "loop.steps", _EPOCHS),
    ("trainer.n_gpus_per_node", "learner.ranks", "one GPU each, beside rollout.workers"),
    ("trainer.nnodes", "resources.address", "the Ray cluster that is joined"),
    ("trainer.save_freq", "checkpoint.every", ""),
    ("trainer.max_actor_ckpt_to_keep", "checkpoint.keep", ""),
    ("trainer.test_freq", "evaluation.every", _HALF_OFF),
    ("trainer.val_before_train", "", "held-out accuracy is always measured before training"),
    ("trainer.experiment_name", "name", ""),
    ("trainer.default_local_dir", "output.folder", ""),
    ("trainer.resume_mode", "", _STARTED),
)

#: What many programs and papers say.
_COMMON: tuple[tuple[str, str, str], ...] = (
    ("batch_size", "loop.prompts_per_step", _GROUPS),
    ("group_size", "loop.fresh", "beside loop.replayed stored ones"),
    ("num_samples", "loop.fresh", "beside loop.replayed stored ones"),
    ("rollouts", "loop.fresh", "completions per prompt; rollout.workers are the engines"),
    ("epochs", "loop.steps", _EPOCHS),
    ("num_epochs", "loop.steps", _EPOCHS),
    ("kl_coef", "learner.objective.beta", ""),
    ("kl_coeff", "learner.objective.beta", ""),
    ("clip_range", "learner.objective.epsilon", ""),
    ("cliprange", "learner.objective.epsilon", ""),
    ("max_new_tokens", "rollout.sampling.max_tokens", ""),
    ("train_file", "data.train", ""),
    ("eval_file", "data.heldout", ""),
    ("num_gpus", "learner.ranks", "one GPU each, beside rollout.workers"),
    ("gpus", "learner.ranks", "one GPU each, beside rollout.workers"),
    ("num_workers", "rollout.workers", ""),
    ("report_to", "", "a run folder and TensorBoard are always written"),
)

TABLES: dict[str, tuple[Counterpart, ...]] = {
    framework: tuple(Counterpart(framework, *row) for row in rows)
    for framework, rows in ((TRL, _TRL), (VERL, _VERL), (SWIFT, _SWIFT), (COMMON, _COMMON))
}


def counterpart(name: str, *, whole: bool = False) -> Counterpart | None:
    """The first framework's key of that name, dashes or not. Unless the ``whole`` name is asked
    for, the last part of verl's dotted ones is enough where all of them mean one key."""
    wanted = name.replace("-", "_")
    for rows in TABLES.values():
        for row in rows:
            if row.name == wanted:
                return row
    if whole:
        return None
    ends = [row for row in TABLES[VERL] if row.name.rpartition(".")[2] == wanted]
    return ends[0] if len({row.key for row in ends}) == 1 else None


_PAGE = """# Coming from TRL, verl or ms-swift

What keys of other frameworks are called here. `avatar explain` takes their names, too, and a recipe
or a command line that uses one is told of ours. This page is generated from the code;
`python -m avatar_rl.cluster.recipe.other_names > docs/other-frameworks.md` writes it anew.

Datasets need no change: TRL's conversational rows, ms-swift's JSONL and verl's parquet are read as
they are ([data.md](data.md)). Three things differ in kind:

- A step is counted in prompts. `loop.prompts_per_step` prompts get `loop.fresh` completions each,
  and `loop.replayed` stored ones join them.
- Generation and learning run at the same time, on processes of their own. `loop.max_staleness`
  bounds how far they are apart; 0 takes them in turn.
- Rewards are named in `rewards.weights`, built-in ones and functions by import path alike
  ([rewards](../rewards/README.md))."""


def page() -> str:
    """docs/other-frameworks.md."""
    parts = [_PAGE]
    for framework in (TRL, VERL, SWIFT):
        rows = [
            f"| `{row.name}` | {f'`{row.key}`' if row.key else '-'} | {row.note} |"
            for row in TABLES[framework]
        ]
        parts.append(f"## {framework}")
        parts.append("\n".join(["| There | Here | Note |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
