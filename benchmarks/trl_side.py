"""TRL's GRPOTrainer on frozen batches: the other side of ``vs_trl``.

What runs is ``GRPOTrainer.train`` as its users call it; only generation and scoring are replaced by
frozen batches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from avatar_rl.learner.config import LearnerConfig
from benchmarks.learner_side import exact_norm


class _Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Seconds from the first micro-batch of a step to the end of the optimiser's update; logging is
    outside."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self._start)


class _FrozenTrainer(GRPOTrainer):  # type: ignore[misc]
    """Hands out frozen batches instead of generating; splitting, loss, backward and update are
    TRL's own."""

    frozen: Sequence[dict[str, Any]]
    turn = 0

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.turn += 1
        return dict(self.frozen[(self.turn - 1) % len(self.frozen)])


class TrlSide:
    """One trainer with ``rows`` completions per micro-batch; a step is one whole frozen batch."""

    def __init__(
        self,
        model: Path,
        frozen: Sequence[dict[str, Any]],
        config: LearnerConfig,
        *,
        rows: int,
        group: int,
        longest: int,
        scratch: Path,
    ) -> None:
        transformers_logging.set_verbosity_error()
        size = len(frozen[0]["prompt_ids"])
        optimizer, objective = config.optimizer, config.objective
        arguments = GRPOConfig(
            output_dir=str(scratch),
            # As the other side: activations are recomputed, in float32.
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=False,
            use_cpu=True,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=size // rows,
            num_generations=group,
            max_completion_length=longest,
            loss_type="grpo",
            beta=objective.beta,
            use_bias_correction_kl=False,  # on by default: KL times the ratio, another objective
            epsilon=objective.epsilon,
            learning_rate=optimizer.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_epsilon=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<eos>",
        )
        self.trainer = _FrozenTrainer(
            model=str(model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["-"] * size}),
            processing_class=tokenizer,
        )
        self.trainer.frozen = frozen
        self.watch = _Stopwatch()
        self.trainer.add_callback(self.watch)

    def run(self, steps: int) -> list[float]:
        """Seconds of each of ``steps`` updates."""
        self.watch.steps.clear()
        self.trainer.args.max_steps = steps
        with contextlib.redirect_stdout(None):
            self.trainer.train()
        return list(self.watch.steps)

    def first_step(self) -> tuple[float, float]:
        """Loss and exact gradient norm before clipping of one update on the first batch."""
        self.trainer.turn = 0
        accelerator, norms = self.trainer.accelerator, []
        plain = accelerator.clip_grad_norm_

        def noted(parameters: Iterable[torch.Tensor], *limits: float) -> torch.Tensor:
            whole = list(parameters)
            norms.append(exact_norm(whole))
            return plain(whole, *limits)

        with patch.object(accelerator, "clip_grad_norm_", noted):
            self.run(1)
        row = next(row for row in self.trainer.state.log_history if "grad_norm" in row)
        return float(row["loss"]), norms[0]


@contextlib.contextmanager
def compact_head() -> Iterator[None]:
    """TRL scores completion positions only where it has Triton; this lets it do so on a CPU as
    well."""
    with patch.object(trl_utils, "_use_triton", lambda device: True):
        yield
