"""Group A: runs that could not learn, or that learn nothing and would not say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.training.learning_watch import (
    ALIKE_STEPS,
    EMPTY_STEPS,
    MASKED_STEPS,
    WARN_STEPS,
    LearningWatch,
)
from benchmarks.bad_inputs.entries import BadInput, Try, recipe

FINE = {
    "groups/fresh": 4.0,
    "completions/truncated_share": 0.1,
    "reward/format": 0.5,
    "reward/std": 0.3,
    "masked/judge": 0.0,
}
TOO_LONG = "DataError: prompt 'p{n}' has {n}75 tokens: 75 prompt tokens + max_tokens 4096 exceed"
NO_FILE = "DataError: /data/a{n}.mp4: no such file"


class Watched:
    """The watch of a run whose steps have these metrics, and what it has said."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.said: list[str] = []
        buffer: Any = SimpleNamespace(requests=SimpleNamespace(quarantined=lambda: self.reasons))
        config = RunConfig.model_validate(
            {
                "model": {"path": "tiny"},
                "data": {"synthetic": {}},
                "rewards": {
                    "weights": {"format": 0.3, "accuracy": 0.3, "judge": 0.4},
                    "judge": {"kind": "rule"},
                },
            }
        )
        self.watch = LearningWatch(config, buffer, lambda _, text: self.said.append(text))

    def set_aside(self, count: int, why: str) -> None:
        self.reasons |= {f"p{len(self.reasons) + n}": why.format(n=n) for n in range(count)}

    def steps(self, count: int, asked: int = 300, unscored: int = 0, **change: float) -> None:
        ledger = SimpleNamespace(dropped={"unscored": unscored})
        stats: Any = SimpleNamespace(
            prompts=asked, quarantined_prompts=len(self.reasons), ledger=ledger
        )
        metrics = FINE | {name.replace("__", "/"): value for name, value in change.items()}
        for _ in range(count):
            self.watch.look(metrics, stats)


def watched(act: Callable[[Watched], None]) -> Try:
    """What the watch says of such steps: the error that ends the run, or its warnings."""

    def tried(folder: Path) -> str:
        run = Watched()
        act(run)
        return "\n".join(run.said)

    return tried


def _set_aside(run: Watched, count: int, asked: int, why: str = TOO_LONG) -> None:
    run.set_aside(count, why)
    run.steps(1, asked=asked)


def _empty(run: Watched, why: str) -> None:
    run.set_aside(8, why)
    run.steps(EMPTY_STEPS, asked=0, groups__fresh=0.0)


def _late_judge(run: Watched) -> None:
    run.steps(1, masked__judge=0.5)
    run.steps(3 * MASKED_STEPS, masked__judge=1.0)


LENGTHS = "rollout: {engine: {max_model_len: 320}, sampling: {max_tokens: 4096}}"
RECIPES: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("lengths", LENGTHS, (), ("rollout.sampling.max_tokens 4096", "raise max_model_len to")),
    (
        "nccl_on_cpus",
        "weights: {transport: nccl}\nrollout: {engine: {device: cpu}}",
        (),
        ("weights.transport nccl goes from GPU to GPU", "set it to gloo"),
    ),
    (
        "ipc_apart",
        "weights: {transport: ipc}",
        (),
        ("weights.transport ipc shares the memory of one GPU", "resources.colocate"),
    ),
    (
        "board_too_seldom",
        "weights: {transport: gloo, board_every: 3}",
        (),
        ("weights.board_every 3", "set it to 2"),
    ),
    (
        "long_completions",
        "",
        ("--rollout.sampling.max_tokens=4096",),
        ("max_tokens 4096 exceed", "max_model_len 16384: raise max_model_len to 18432"),
    ),
    (
        "long_evaluation",
        "",
        ("--evaluation.max_tokens=4096",),
        ("evaluation.max_tokens 4096", "raise max_model_len to"),
    ),
    (
        "long_prompts",
        "",
        ("--data.template.max_prompt_tokens=20000",),
        ("max_prompt_tokens 20000", "raise max_model_len to"),
    ),
    (
        "videos_fill_the_prompt",
        "",
        ("--data.template.total_video_tokens=14336",),
        ("total_video_tokens 14336 leaves no room", "lower it"),
    ),
    (
        "fp8_unjudged",
        "",
        ("--rollout.engine.quantization=fp8",),
        ("quantization fp8", "Set probe.tolerance"),
    ),
    (
        "fp8_uncorrected",
        "",
        (
            "--rollout.engine.quantization=fp8",
            "--probe.tolerance=0.6",
            "--learner.objective.old_logprobs=behaviour",
        ),
        ("quantization fp8 needs a correction", "set learner.objective.old_logprobs to auto"),
    ),
    (
        "temperature_0",
        "",
        ("--rollout.sampling.temperature=0",),
        ("rollout.sampling.temperature 0", "above 0"),
    ),
    (
        "group_of_one",
        "",
        ("--loop.fresh=1", "--loop.replayed=0"),
        ("loop.fresh 1", "set loop.fresh to 2"),
    ),
    (
        "group_of_one_alpha_0",
        "",
        ("--loop.fresh=1", "--learner.objective.alpha=0"),
        ("loop.fresh 1", "alpha above 0"),
    ),
    ("dead_key_n", "", ("--rollout.sampling.n=4",), ("rollout.sampling.n", "loop.fresh")),
    ("dead_key_lease_s", "", ("--buffer.lease_s=5",), ("buffer.lease_s", "set rollout.lease_s")),
    (
        "fusion_without_room",
        "",
        ("--rewards.weights.fusion=0.5", "--rollout.max_sequences=23"),
        ("max_sequences 23 is below one group of 24", "fusion"),
    ),
    (
        "group_beyond_engine",
        "",
        ("--rollout.max_sequences=2",),
        ("rollout.max_sequences 2", "below one group of 8"),
    ),
    (
        "pack_below_one_prompt_and_completion",
        "",
        ("--learner.micro_batch_tokens=300",),
        ("learner.micro_batch_tokens 300", "raise micro_batch_tokens to"),
    ),
    (
        "shared_packs_that_do_not_divide_the_ranks",
        "",
        ("--learner.ranks=4", "--learner.sequence_parallel=3"),
        ("sequence_parallel 3 does not divide ranks 4", "set it to one of 1, 2, 4"),
    ),
    (
        "shared_packs_and_a_balanced_router",
        "learner: {ranks: 2, sequence_parallel: 2, router: balanced}",
        (),
        ("sequence_parallel 2 and router: balanced", "set router to frozen"),
    ),
    (
        "offload_without_zero",
        "",
        ("--learner.optimizer.offload_optimizer=true",),
        ("offload_optimizer", "zero_stage 1, 2 or 3"),
    ),
    (
        "tas_averaged_away",
        "",
        ("--learner.objective.ratio=sequence_plain", "--learner.objective.tas_lambda=0.3"),
        ("sequence_plain", "tas_lambda: 0"),
    ),
    ("no_data", "data: {}", (), ("data needs", "`train: FILE` or a `synthetic:` section")),
    (
        "two_worlds",
        "",
        ("--data.train=x.jsonl",),
        ("both `synthetic` and dataset files", "keep one"),
    ),
    (
        "cold_start_without_rows",
        "data: {train: x}\ncold_start: {steps: 1}",
        (),
        ("cold_start", "`data.sft: FILE`"),
    ),
    (
        "colocated_with_staleness",
        "resources: {colocate: true}\nrollout: {engine: {kv_cache_memory_bytes: 67108864}}",
        (),
        ("colocate", "loop.max_staleness 1", "set it to 0"),
    ),
    (
        "colocated_without_cache_bytes",
        "resources: {colocate: true}\nloop: {max_staleness: 0}",
        (),
        ("colocate needs", "kv_cache_memory_bytes", "--dry-run"),
    ),
    (
        "colocated_and_autoscaled",
        "resources: {colocate: true}\nloop: {max_staleness: 0}\n"
        "rollout: {autoscale: true, max_workers: 2, engine: {kv_cache_memory_bytes: 67108864}}",
        (),
        ("colocate", "autoscale and rollout.max_workers out"),
    ),
    (
        "autoscale_without_bound",
        "rollout: {autoscale: true}",
        (),
        ("autoscale", "max_workers: say how far"),
    ),
    (
        "split_engine",
        "rollout: {engine: {tensor_parallel_size: 2}}",
        (),
        ("tensor_parallel_size 2", "resources.rollout_gpus 2"),
    ),
)
WATCHED: tuple[tuple[str, Callable[[Watched], None], tuple[str, ...]], ...] = (
    (
        "prompts_set_aside",
        lambda run: _set_aside(run, 213, 43),
        ("213 of 256 prompts set aside", "max_tokens 4096 exceed", "quarantine_limit", "validate"),
    ),
    (
        "media_set_aside",
        lambda run: _set_aside(run, 64, 64, NO_FILE),
        ("64 of 128 prompts set aside", "no such file", "data validate"),
    ),
    (
        "few_set_aside",
        lambda run: _set_aside(run, 3, 297),
        ("3 of 300 prompts set aside", "max_tokens 4096 exceed"),
    ),
    (
        "no_group_too_long",
        lambda run: _empty(run, TOO_LONG),
        (f"last {EMPTY_STEPS} steps had no group", "max_tokens 4096 exceed"),
    ),
    (
        "no_group_no_file",
        lambda run: _empty(run, NO_FILE),
        (f"last {EMPTY_STEPS} steps had no group", "no such file"),
    ),
    (
        "no_group_unscored",
        lambda run: run.steps(EMPTY_STEPS, unscored=12, groups__fresh=0.0),
        ("12 groups dropped as unscored", "the judge"),
    ),
    (
        "masked_throughout",
        lambda run: run.steps(MASKED_STEPS, masked__judge=1.0),
        ("reward judge had no mark", "judge"),
    ),
    ("judge_fails_later", _late_judge, ("reward judge has no mark",)),
    (
        "every_completion_cut_off",
        lambda run: run.steps(WARN_STEPS, completions__truncated_share=1.0),
        ("rollout.sampling.stop", "max_tokens"),
    ),
    (
        "no_format",
        lambda run: run.steps(WARN_STEPS, reward__format=-1.0),
        ("format", "data.template.instruction", "cold start"),
    ),
    (
        "breaker_open",
        lambda run: run.steps(1, judge__breaker_open=1.0),
        ("circuit breaker is open", "look at its endpoint"),
    ),
    (
        "all_paid_alike",
        lambda run: run.steps(ALIKE_STEPS, reward__std=0.0),
        ("paid alike",),
    ),
)
ENTRIES = [
    *(BadInput("A", name, recipe(text, *over), words, True) for name, text, over, words in RECIPES),
    *(BadInput("A", name, watched(act), words) for name, act, words in WATCHED),
]
