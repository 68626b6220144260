"""What a learner step costs -> build/bench/learner.json; run with ``make bench NAME=learner``.

``packed_vs_copied_*``: seconds of transformers' own forward and backward over copied prompts over
those of a pack. ``vs_trl``, ``vs_trl_image``: completion tokens/s of the learner over those of
TRL's GRPOTrainer on the same frozen batches. ``head_peak_ratio``: memory of the tiled head over one
chunk of plain autograd. All by turns in one process, after both sides gave the same loss and
gradients; activations are recomputed everywhere. docs/benchmarks.md says how to read them."""

from __future__ import annotations

import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from avatar_rl.cluster.services.services import CPU_ENVIRONMENT, ENVIRONMENT
from avatar_rl.learner.batch.packing import Size, pack
from avatar_rl.learner.batch.plan import StepWork
from benchmarks.harness import Figures, parser, spread
from benchmarks.head_side import peak_bytes
from benchmarks.learner_side import (
    GROUP,
    LONGEST,
    BenchLearner,
    FrozenPrompts,
    FrozenStep,
    PromptMaker,
    build_image_models,
    build_text_models,
    image_prompt,
    load_policy,
    make_spec,
    settings,
    text_prompt,
)
from benchmarks.packed_side import (
    AVATAR,
    GRPO,
    CopiedSide,
    PackedSide,
    Shape,
    build_vision_model,
    make_rows,
)

Figure = Iterator[tuple[str, float]]

AGREEMENT = 1e-5  # of losses (absolute), gradient norms and gradients (relative)


@dataclass(frozen=True)
class Sizes:
    """What is measured at which sizes."""

    prompts: int = 4  # per step of the text model
    image_prompts: int = 2  # per step of the other one
    batches: int = 2  # frozen ones, in turn
    trl_rows: tuple[int, ...] = (4, 8, 16)  # completions per micro-batch
    copied_rows: tuple[int, ...] = (2, 4, 8)
    scale: float = 1.0  # of prompts and completions of packed_vs_copied
    head_tokens: int = 2048


SMOKE = Sizes(2, 1, 1, (8,), (8,), 0.1, 600)


# -- a pack against copies -------------------------------------------------------------------------


def packed_vs_copied(folder: Path, shape: Shape, rounds: int, sizes: Sizes) -> Figure:
    """Copies in the fastest of three micro-batches; the ceiling is what would be gained if every
    position cost the same."""
    name = f"packed_vs_copied_{shape.name}"
    rows = make_rows(shape, scale=sizes.scale)
    packed = PackedSide(folder, rows)
    copies = {count: CopiedSide(folder, rows, count) for count in sizes.copied_rows}
    loss, gradients = packed.gradients()
    size = torch.stack([g.norm() for g in gradients.values()]).norm()
    for copied in copies.values():
        other_loss, others = copied.gradients()
        if others.keys() != gradients.keys():
            raise SystemExit(f"{name}: other parameters have gradients: nothing to compare")
        gaps = torch.stack([(others[n] - g).norm() for n, g in gradients.items()])
        difference = max(abs(loss - other_loss), float(gaps.norm() / size))
        if difference > AGREEMENT:
            raise SystemExit(
                f"{name}: loss or gradients differ by {difference:.2g}: nothing to compare"
            )
    yield f"{name}_spread_ppm", 1e6 * difference
    spent = {count: copied.seconds() for count, copied in copies.items()}
    best = min(spent, key=lambda count: spent[count])
    yield f"{name}_rows", best
    ratios = by_turns(copies[best].seconds, packed.seconds, rounds)
    yield from spread(name, ratios)
    yield f"{name}_ceiling", copies[best].positions / packed.positions


# -- against TRL -----------------------------------------------------------------------------------


class Duel:
    """Learner and TRL over the same model folder and frozen batches."""

    def __init__(
        self,
        folder: Path,
        models: tuple[Path, Path],
        make_prompt: PromptMaker,
        prompts: int,
        threads: int,
        sizes: Sizes,
    ) -> None:
        from benchmarks.trl_side import (
            TrlSide,  # before the learner sets up its process group: TRL knows of none
        )

        self.sizes = sizes
        policy, reference = models
        scorers = load_policy(policy), load_policy(reference)
        frozen = [
            FrozenStep.make(number, prompts, *scorers, make_prompt)
            for number in range(sizes.batches)
        ]
        asked = {name: prompt for batch in frozen for name, prompt in batch.prompts.items()}
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
        self.budget = config.pack_tokens()
        self.ours = BenchLearner(make_spec(policy, reference, config), FrozenPrompts(asked))

    def agree(self) -> Figure:
        """Loss and gradient norm of a first step of the learner and every TRL configuration, before
        any is timed."""
        from benchmarks.trl_side import compact_head

        with compact_head():
            sides = [side.first_step() for side in self.trl.values()]
        sides.append(self.ours.update(self.works[0], exact=True))
        for name, values in zip(("loss", "grad_norm"), zip(*sides, strict=True), strict=True):
            # The loss sums terms of about 1 that cancel: it compares absolutely, the norm
            # relatively.
            difference = (max(values) - min(values)) / (1.0 if name == "loss" else max(values))
            if difference > AGREEMENT:
                raise SystemExit(
                    f"{name} differs by {difference:.2g} between the sides ({values}): nothing to "
                    "compare"
                )
            yield f"{name}_spread_ppm", 1e6 * difference

    def learner_s(self) -> float:
        return sum(self.ours.seconds(self.works))

    def trl_s(self, rows: int) -> float:
        from benchmarks.trl_side import compact_head

        with compact_head():
            return sum(self.trl[rows].run(self.sizes.batches))


def vs_trl(duel: Duel, name: str, rounds: int) -> Figure:
    """TRL with its compact head at its best micro-batch, the learner at its default budget."""
    label = name.removeprefix("vs_trl")
    for key, value in duel.agree():
        yield f"{key}{label}", value
    duel.learner_s()  # remembers the reference log-probabilities, which TRL is given
    spent_by = {rows: duel.trl_s(rows) for rows in duel.sizes.trl_rows}
    for rows, spent in spent_by.items():
        yield f"trl_tokens_per_s_{rows}_rows{label}", duel.tokens / spent
    best = min(spent_by, key=lambda rows: spent_by[rows])
    yield f"trl_best_rows{label}", best
    learner: list[float] = []

    def ours() -> float:
        learner.append(duel.learner_s())
        return learner[-1]

    yield from spread(name, by_turns(lambda: duel.trl_s(best), ours, rounds))
    yield f"learner_tokens_per_s{label}", duel.tokens / statistics.median(learner)
    yield f"padding_share{label}", padding_share(duel.works, duel.budget)


def padding_share(works: Sequence[StepWork], budget: int) -> float:
    """Share of the computed positions beyond one for each distinct prompt token and completion
    token: padding, and prompts that are computed more than once."""
    real = computed = 0
    for work in works:
        sizes = [
            Size((t.prompt_id, t.hinted), t.prompt_tokens, len(t.token_ids))
            for group in work.groups
            for t in group.trajectories
        ]
        completions = sum(size.tokens for size in sizes)
        real += sum({size.key: size.prompt_tokens for size in sizes}.values()) + completions
        for batch in pack(sizes, budget):
            prompts = {sizes[i].key: sizes[i].prompt_tokens for i in batch}
            computed += sum(prompts.values()) + sum(sizes[i].tokens for i in batch)
    return 1 - real / computed


# -- the head --------------------------------------------------------------------------------------


def head_peak(tokens: int) -> Figure:
    """Each in a fresh process; both by one thread."""
    tiled, chunk = (peak_bytes(which, tokens) for which in ("tiled", "chunk"))
    yield "head_peak_mib", tiled / 2**20
    yield "head_peak_mib_chunk", chunk / 2**20
    yield "head_peak_ratio", tiled / chunk


def by_turns(theirs: Callable[[], float], ours: Callable[[], float], rounds: int) -> list[float]:
    """Their seconds over ours, round by round; who begins takes turns."""
    ratios = []
    for turn in range(rounds):
        first = ours() if turn % 2 else None
        spent = theirs()
        ratios.append(spent / (first or ours()))
    return ratios


def measure(folder: Path, which: set[str], rounds: int, threads: int, sizes: Sizes) -> Figure:
    if "packed" in which:
        model = build_vision_model(folder / "packed")
        for shape in (GRPO, AVATAR):
            yield from packed_vs_copied(model, shape, rounds, sizes)
    if "head" in which:
        yield from head_peak(sizes.head_tokens)
    if "text" in which:
        models = build_text_models(folder / "text")
        text = Duel(folder, models, text_prompt, sizes.prompts, threads, sizes)
        yield from vs_trl(text, "vs_trl", rounds)
    if "image" in which:
        models = build_image_models(folder / "image")
        image = Duel(folder, models, image_prompt, sizes.image_prompts, threads, sizes)
        yield from vs_trl(image, "vs_trl_image", rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    parts = ("packed", "head", "text", "image")
    options_of = parser(__doc__)
    options_of.add_argument("--rounds", type=int, default=3, help="turns per ratio")
    options_of.add_argument("--threads", type=int, default=1, help="CPU threads of both sides")
    options_of.add_argument("--only", choices=parts, action="append", help="some of the parts")
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
        which = set(options.only or parts)
        for item in measure(Path(name), which, rounds, options.threads, sizes):
            figures.add(dict([item]))
    figures.write()


if __name__ == "__main__":
    main()
