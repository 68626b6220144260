"""TRL's side of benchmarks/loop.py, in a process of its own: GRPOTrainer with its own generate.

python -m benchmarks.loops.trl_loop_side JOB.json  writes JOB.steps.json, a row a step."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import AutoProcessor, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.loops.rewards import answers, even_share
from benchmarks.loops.tasks import GROUP
from benchmarks.trl_side import compact_head


class Steps(TrainerCallback):  # type: ignore[misc]
    """Wall seconds, processor seconds and mean reward of every step, from the end of the one
    before: generation, scoring, update."""

    def __init__(self, until: float | None, window: int) -> None:
        self.rows: list[dict[str, float]] = []
        self.until, self.window = until, window
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.rows.append({"seconds": wall - self._wall, "cpu": cpu - self._cpu})
        self._wall, self._cpu = wall, cpu

    def on_log(
        self, _: Any, __: Any, control: Any, logs: dict[str, float] | None = None, **___: Any
    ) -> None:
        if logs is None or "reward" not in logs:
            return
        row = self.rows[-1]
        row |= {"reward": logs["reward"], "length": logs["completions/mean_length"]}
        lately = [row["reward"] for row in self.rows[-self.window :] if "reward" in row]
        if self.until is not None and len(lately) == self.window:
            control.should_training_stop = sum(lately) / self.window >= self.until


def rows_of(path: Path) -> Dataset:
    """The native rows as TRL takes them: a conversation, and a picture beside it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns: dict[str, list[Any]] = {
        "prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
        "truth": [row["answer"] for row in rows],
    }
    if "media" not in rows[0]:
        return Dataset.from_dict(columns)
    columns["image"] = [row["media"]["items"][0]["uri"] for row in rows]
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def reward_of(name: str) -> Callable[..., list[float]]:
    """A reward as TRL calls it; ``name`` is that of benchmarks/loops/tasks.py."""

    def even_words(completions: list[Any], **_: Any) -> list[float]:
        return [even_share(one[0]["content"]) for one in completions]

    def right_colour(completions: list[Any], truth: list[str], **_: Any) -> list[float]:
        return [
            answers(one[0]["content"], right) for one, right in zip(completions, truth, strict=True)
        ]

    return {"even_words": even_words, "right_colour": right_colour}[name]


def make_trainer(job: dict[str, Any], steps: Steps) -> GRPOTrainer:
    model = job["model"]
    load = AutoProcessor if job["image"] else AutoTokenizer
    size = job["prompts"] * GROUP
    fixed = {"min_new_tokens": job["tokens"]} if job["fixed"] else {}
    arguments = GRPOConfig(
        output_dir=job["scratch"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=job["seed"],
        per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=size // job["rows"],
        num_generations=GROUP,
        max_completion_length=job["tokens"],
        generation_kwargs=fixed or None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="grpo",
        beta=job["beta"],
        use_bias_correction_kl=False,  # on by default: KL times the ratio, another objective
        epsilon=job["epsilon"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        adam_epsilon=job["eps"],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["max_grad_norm"],
        max_steps=job["steps"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward_of(job["reward"]),
        args=arguments,
        train_dataset=rows_of(Path(job["rows_file"])),
        processing_class=load.from_pretrained(model),
        callbacks=[steps],
    )


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(job["threads"])
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    steps = Steps(job["until"], job["window"])
    trainer = make_trainer(job, steps)
    with compact_head(), contextlib.redirect_stdout(None):
        trainer.train()
    found = {"steps": steps.rows, "prompt_ids": first_prompt(trainer, job)}
    path.with_suffix(".steps.json").write_text(json.dumps(found))


def first_prompt(trainer: GRPOTrainer, job: dict[str, Any]) -> list[int]:
    """Token ids of the first row's prompt, media placeholders expanded: to compare."""
    row = trainer.train_dataset[0]
    content: Any = row["prompt"][0]["content"]
    if job["image"]:
        content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": content}]
    found = trainer.processing_class.apply_chat_template(
        conversation=[[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return [int(token) for token in found["input_ids"][0]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
