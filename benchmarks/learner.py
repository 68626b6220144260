"""What a learner step costs -> build/bench/learner.json; run with ``make bench NAME=learner``,
about five minutes.

``vs_trl``: completion tokens/s of the learner over those of TRL's GRPOTrainer on the same frozen
batches of a text model, by turns in one process, after both gave the same loss and gradient norm.
``media_once``: seconds of a step on audio-visual prompts without ``learner.share_prefix`` over
those with it. docs/benchmarks.md says how to read them."""

from __future__ import annotations

import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from avatar_rl.cluster.services.services import CPU_ENVIRONMENT, ENVIRONMENT
from avatar_rl.learner.batch.microbatch import Size, pack
from avatar_rl.learner.batch.plan import StepWork
from avatar_rl.learner.model.policy import length_runs
from benchmarks.harness import Figures, parser
from benchmarks.learner_side import (
    GROUP,
    LONGEST,
    BenchLearner,
    FrozenPrompts,
    FrozenText,
    build_text_models,
    load_policy,
    make_spec,
    make_step,
    score,
    settings,
    with_behaviour,
)

Figure = Iterator[tuple[str, float]]

AGREEMENT = 1e-4  # of losses (absolute) and gradient norms (relative)


@dataclass(frozen=True)
class Sizes:
    """What is measured at which sizes."""

    prompts: int = 4  # per step of the text model
    batches: int = 2  # frozen ones of the text model, in turn
    clips: int = 8  # per step of the audio-visual one
    trl_rows: tuple[int, ...] = (4, 8, 16)  # completions per micro-batch
    budgets: tuple[int, ...] = (1024, 2048, 4096, 16_384)  # the last is the default
    frozen: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("", ()),
        ("_frozen", ("visual", "audio_tower")),
    )


SMOKE = Sizes(4, 1, 1, (16,), (16_384,), (("_frozen", ("visual", "audio_tower")),))


class TextDuel:
    """Learner and TRL over the same model folder and frozen batches."""

    def __init__(self, folder: Path, threads: int, sizes: Sizes) -> None:
        from benchmarks.trl_side import (
            TrlSide,  # before the learner sets up its process group: TRL knows of none
        )

        self.sizes = sizes
        policy, reference = build_text_models(folder)
        models = load_policy(policy), load_policy(reference)
        frozen = [
            FrozenText.make(number, sizes.prompts, *models) for number in range(sizes.batches)
        ]
        prompts = {name: prompt for batch in frozen for name, prompt in batch.prompts.items()}
        config = settings(threads)
        self.works = [batch.work for batch in frozen]
        self.tokens = sum(batch.tokens for batch in frozen)
        self.trl = {
            rows: TrlSide(
                policy,
                [batch.trl for batch in frozen],
                config,
                rows=rows,
                group=GROUP,
                longest=LONGEST,
                scratch=folder / "trl",
            )
            for rows in sizes.trl_rows
        }
        self.ours = {
            budget: BenchLearner(
                make_spec(policy, reference, settings(threads, micro_batch_tokens=budget)),
                FrozenPrompts(prompts),
            )
            for budget in sizes.budgets
        }

    def agree(self) -> Figure:
        """Loss and gradient norm of a first step of every learner and every TRL configuration,
        before any is timed."""
        sides = [side.first_step() for side in self.trl.values()]
        sides += [side.update(self.works[0]) for side in self.ours.values()]
        for name, values in zip(("loss", "grad_norm"), zip(*sides, strict=True), strict=True):
            # The loss sums terms of about 1 that cancel: it compares absolutely, the norm
            # relatively.
            spread = (max(values) - min(values)) / (1.0 if name == "loss" else max(values))
            if spread > AGREEMENT:
                raise SystemExit(
                    f"{name} differs by {spread:.2g} between the sides ({values}): nothing to "
                    "compare"
                )
            yield f"{name}_spread_ppm", 1e6 * spread

    def learner_s(self, budget: int) -> float:
        return sum(self.ours[budget].seconds(self.works))

    def trl_s(self, rows: int, *, compact: bool) -> float:
        from benchmarks.trl_side import compact_head

        with compact_head() if compact else nullcontext():
            return sum(self.trl[rows].run(self.sizes.batches))


def vs_trl(duel: TextDuel, rounds: int) -> Figure:
    """TRL at its best micro-batch, the learner at its default token budget."""
    budgets = duel.sizes.budgets
    yield from duel.agree()
    for budget in budgets:
        duel.learner_s(
            budget
        )  # reference log-probabilities are remembered from here on, as TRL is given them
    for budget in budgets:
        yield f"learner_tokens_per_s_budget_{budget}", duel.tokens / duel.learner_s(budget)
        yield f"learner_padding_share_budget_{budget}", padding_share(duel.works, budget)
    for compact in (False, True):
        head = "_compact" if compact else ""
        spent_by = {rows: duel.trl_s(rows, compact=compact) for rows in duel.sizes.trl_rows}
        for rows, spent in spent_by.items():
            yield f"trl{head}_tokens_per_s_{rows}_rows", duel.tokens / spent
        best = min(spent_by, key=lambda rows: spent_by[rows])
        yield f"trl{head}_best_rows", best
        pairs = []
        for turn in range(rounds):
            first = duel.learner_s(budgets[-1]) if turn % 2 else None
            theirs = duel.trl_s(best, compact=compact)
            pairs.append((theirs, first or duel.learner_s(budgets[-1])))
        yield from _ratio(f"vs_trl{head}", [theirs / ours for theirs, ours in pairs])
        yield (
            f"trl{head}_tokens_per_s",
            duel.tokens / statistics.median(theirs for theirs, _ in pairs),
        )
        yield (
            f"learner_tokens_per_s{head}",
            duel.tokens / statistics.median(ours for _, ours in pairs),
        )


def padding_share(works: Sequence[StepWork], budget: int) -> float:
    """Share of the computed positions that hold no token, prompts shared."""
    real = computed = 0
    for work in works:
        sizes = [
            Size((t.prompt_id, t.hinted), t.prompt_tokens, len(t.token_ids))
            for group in work.groups
            for t in group.trajectories
        ]
        for batch in pack(sizes, budget, share_prefix=True):
            prompts = {sizes[i].key: sizes[i].prompt_tokens for i in batch}
            real += sum(prompts.values()) + sum(sizes[i].tokens for i in batch)
            computed += len(prompts) * max(prompts.values())
            lengths = [sizes[i].tokens for i in batch]
            computed += sum(len(run) * max(lengths[i] for i in run) for run in length_runs(lengths))
    return 1 - real / computed


def media_once(cache: Path, rounds: int, threads: int, sizes: Sizes) -> Figure:
    """Eight clips with sound of the synthetic world, the tiny Qwen2.5-Omni; encoders trained, then
    frozen."""
    from avatar_rl.cluster.config import RunConfig
    from avatar_rl.cluster.recipe.assets import prepare_base_model, prepare_datasets
    from avatar_rl.cluster.workers.pool import learner_spec

    raw: dict[str, Any] = {
        "data": {
            "synthetic": {"n_train": sizes.clips, "n_heldout": 1, "n_sft": 0},
            "template": {"min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 256},
        },
        "output": {"cache": cache},
    }
    for name, freeze in sizes.frozen:
        sides: dict[bool, BenchLearner] = {}
        for share in (True, False):
            learner = settings(threads, share_prefix=share, optimizer={"freeze": freeze})
            config = RunConfig.model_validate(raw | {"learner": learner.model_dump()})
            datasets = prepare_datasets(config, lambda *_: None)
            model = prepare_base_model(config, lambda *_: None)
            sides[share] = BenchLearner(learner_spec(config, "bench", model, datasets, ""))
        works = _media_steps(sides[True], sizes.clips)
        found = {
            share: [side.update(work) for work in works] for share, side in sides.items()
        }  # warms both as well
        (losses, norms), (other_losses, other_norms) = (
            np.array(found[share]).T for share in (True, False)
        )
        difference = max(np.abs(losses - other_losses).max(), np.abs(1 - other_norms / norms).max())
        if difference > AGREEMENT:
            raise SystemExit(
                f"loss or gradient norm differs by {difference:.2g} with share_prefix: nothing to "
                "compare"
            )
        yield f"media_once{name}_spread_ppm", 1e6 * difference
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(rounds):
            for share in (True, False) if turn % 2 else (False, True):
                times[share].append(sum(sides[share].seconds(works)))
        yield from _ratio(
            f"media_once{name}",
            [slow / fast for slow, fast in zip(times[False], times[True], strict=True)],
        )
        for share, values in times.items():
            label = "shared" if share else "copied"
            yield f"media_step_ms_{label}{name}", 1e3 * statistics.median(values) / len(works)


def _media_steps(learner: BenchLearner, clips: int) -> list[StepWork]:
    """Two steps over the training prompts, completions of 12 to 48 tokens."""
    asked = [prompt for prompt in learner.prompts if prompt.id.startswith("train")][:clips]
    prompts = {prompt.id: learner.encoder.encode(prompt, False) for prompt in asked}
    rng = np.random.default_rng(0)
    works = [
        make_step(number, prompts, rng, shortest=12, longest=48, tokens=(30, 400))
        for number in range(2)
    ]
    return [with_behaviour(work, score(learner.engine.policy, work, prompts)) for work in works]


def _ratio(name: str, values: Sequence[float]) -> Figure:
    yield name, statistics.median(values)
    yield f"{name}_low", min(values)
    yield f"{name}_high", max(values)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--rounds", type=int, default=3, help="turns per ratio")
    options_of.add_argument("--threads", type=int, default=1, help="CPU threads of both sides")
    options_of.add_argument("--only", choices=("text", "media"), help="one half")
    options_of.add_argument("--cache", type=Path, help="for clips and tiny model; none: new ones")
    options = options_of.parse_args(arguments)
    sizes, rounds = (SMOKE, 1) if options.smoke else (Sizes(), options.rounds)
    for name, value in {**ENVIRONMENT, **CPU_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    figures = Figures("learner", options.out)
    figures.add({"threads": options.threads})
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = Path(name)
        if options.only != "media":
            for item in vs_trl(TextDuel(folder, options.threads, sizes), rounds):
                figures.add(dict([item]))
        if options.only != "text":
            cache = options.cache or folder / "cache"
            for item in media_once(cache, rounds, options.threads, sizes):
                figures.add(dict([item]))
    figures.write()


if __name__ == "__main__":
    main()
