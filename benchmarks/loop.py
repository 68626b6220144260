"""Whole training loops against TRL's -> build/bench/loop.json; run with ``make bench NAME=loop``.

Generate, score, update, publish, by turns on the same cores: a run as a user starts it against
TRL's GRPOTrainer with its own generate, both in float32. ``text_*``: 64 completions of 64 tokens an
update; ``image_*``: 8 of 48 to a picture of 300 tokens; ``replay_rate``: updates/s of 4 fresh and 4
replayed over all fresh where a slow engine decides. Each is TRL's seconds an update over ours.

    python -m benchmarks.loop                  measures these; ``image_target_*`` is from records
    python -m benchmarks.loop --run            measures what the records lack first, an hour

docs/benchmarks.md says how to read them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from avatar_rl.cluster.recipe.overlays import merge
from benchmarks.harness import Figures, parser, spread
from benchmarks.loops import ours, tasks, theirs
from benchmarks.loops.tasks import Task
from benchmarks.studies.runs import RECORDS, Records, commit_of_code

Figure = Iterator[tuple[str, float]]
#: What the wall time of an update of ours goes to, as the run's metrics call it.
PHASES = ("learner_wait", "rollout_wait", "forward_backward", "replicate", "publish")
BETA = 0.04
FOLDER = Path("build/bench/loop")
PARTS = ("text", "image", "replay", "target")
#: Replayed completions of a group of eight, by arm of ours.
REPLAYED = {"fresh": 0, "mixed": 4}
TARGET_ARMS = ("trl", "fresh", "mixed")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Sizes:
    """What is measured at which sizes."""

    text_rows: tuple[int, ...] = (8, 16, 32)  # TRL's micro-batches, in completions
    image_rows: tuple[int, ...] = (2, 4, 8)
    text_steps: int = 7
    image_steps: int = 40
    image_prompts: int = 32
    rounds: int = 2
    trials: int = 3  # steps of TRL by which its micro-batch is chosen
    arms: tuple[str, ...] = ("fresh", "mixed")
    replay_steps: int = 7
    target_steps: int = 300
    target: float = 0.85
    window: int = 16  # updates over which the accuracy is averaged
    sft_steps: int = tasks.SFT_STEPS


SMOKE = Sizes(
    image_rows=(8,), image_steps=3, image_prompts=4, rounds=1, arms=("fresh",), sft_steps=1
)
SMOKE_PARTS = ("image", "target")  # the others differ in sizes only, and take a run each


class Bench:
    """Both sides over the same tasks, in one folder."""

    def __init__(self, folder: Path, sizes: Sizes, threads: int) -> None:
        self.folder, self.sizes, self.threads = folder.resolve(), sizes, threads

    def text(self) -> Task:
        model = self.folder / "text_model"
        if not (model / "config.json").is_file():
            tasks.build_text_model(model)
        rows = tasks.write_text_rows(self.folder / "text" / "rows.jsonl", 64)
        return Task("text", model, rows, "benchmarks.loops.rewards:even_words", 8, 64, 1e-3)

    def image(self) -> Task:
        """From the cold start, so that its answers are answers; all of its 48 tokens."""
        model = self.folder / "image_model"
        if not (model / "config.json").is_file():
            tasks.build_image_model(model)
        rows = tasks.write_image_rows(
            self.folder / "image" / "rows.jsonl", self.sizes.image_prompts
        )
        start = self.folder / f"image_start_{self.sizes.sft_steps}"
        if not (start / "config.json").is_file():
            tasks.cold_start(model, rows, start, self.sizes.sft_steps)
        return Task(
            "image", start, rows, "benchmarks.loops.rewards:right_colour", 1, 48, 3e-4, image=True
        )

    def trl(self, task: Task, rows: int, steps: int, **changes: Any) -> theirs.TrlRun:
        job = theirs.job(task, rows=rows, steps=steps, threads=self.threads, beta=BETA)
        return theirs.train(job | changes, self.folder / "trl")

    def ours(self, task: Task, replayed: int, steps: int, **changes: dict[str, Any]) -> ours.OurRun:
        raw = ours.recipe(task, steps=steps, replayed=replayed, beta=BETA)
        return ours.train(merge(raw, changes), self.folder / "ours")

    def best_rows(self, task: Task, candidates: Sequence[int]) -> tuple[int, dict[int, float]]:
        """TRL's fastest micro-batch, and its seconds an update by micro-batch."""
        if len(candidates) == 1:
            return candidates[0], {}
        spent = {rows: self.trl(task, rows, self.sizes.trials).seconds for rows in candidates}
        return min(spent, key=lambda rows: spent[rows]), spent


def against_trl(bench: Bench, task: Task, candidates: Sequence[int], steps: int) -> Figure:
    """TRL's seconds an update over ours, round by round; who begins takes turns."""
    name, sizes = task.name, bench.sizes
    best, spent = bench.best_rows(task, candidates)
    for rows, seconds in spent.items():
        yield f"{name}_trl_s_{rows}_rows", seconds
    yield f"{name}_trl_best_rows", best
    trl_runs: list[theirs.TrlRun] = []
    own: dict[str, list[ours.OurRun]] = {arm: [] for arm in sizes.arms}
    for turn in range(sizes.rounds):
        if turn % 2 == 0:
            trl_runs.append(bench.trl(task, best, steps))
        for arm, runs in own.items():
            runs.append(bench.ours(task, REPLAYED[arm], steps))
        if turn % 2:
            trl_runs.append(bench.trl(task, best, steps))
        check_same(task, trl_runs[-1], own["fresh"][-1])
    cores = os.cpu_count() or 1
    for arm, runs in own.items():
        pairs = list(zip(trl_runs, runs, strict=True))
        yield from spread(f"{name}_{arm}", [trl.seconds / run.seconds for trl, run in pairs])
        ceilings = [trl.seconds * cores / run.core_seconds for trl, run in pairs]
        ceiling = "ceiling" if arm == "fresh" else f"ceiling_{arm}"
        yield f"{name}_{ceiling}", statistics.median(ceilings)
        yield f"{name}_{arm}_replayed", runs[-1].mean("replay/share")
        for part in PHASES:
            yield f"{name}_{arm}_{part}_s", statistics.mean(r.mean(f"time/{part}") for r in runs)
    sides: dict[str, Sequence[theirs.TrlRun | ours.OurRun]] = {"trl": trl_runs, **own}
    for side, runs in sides.items():
        yield f"{name}_{side}_s", statistics.median(run.seconds for run in runs)
        yield f"{name}_{side}_core_s", statistics.median(run.core_seconds for run in runs)
        for when, part in (("first", slice(2)), ("last", slice(-2, None))):
            rewards = [reward for run in runs for _, reward in run.rewards()[part]]
            yield f"{name}_{side}_reward_{when}", statistics.mean(rewards)


def check_same(task: Task, trl: theirs.TrlRun, run: ours.OurRun) -> None:
    """Prompts are equally long on both sides, and so are completions. Raises SystemExit."""
    row, completions = run.rows[-1], task.prompts * tasks.GROUP
    # the last token of a completion is predicted, and predicts nothing
    prompt = row["tokens/computed"] - (row["tokens/trained"] - completions)
    if prompt != task.prompts * len(trl.prompt_ids):
        raise SystemExit(
            f"{task.name}: {task.prompts} prompts have {prompt:.0f} tokens here and "
            f"{len(trl.prompt_ids)} each in TRL: nothing to compare"
        )
    length = run.rows[-1]["completion/length_mean"]
    if task.fixed and not length == trl.steps[-1]["length"] == task.tokens:
        raise SystemExit(f"{task.name}: completions of {length} and {trl.steps[-1]['length']}")


# -- where generation decides ----------------------------------------------------------------------


def replay(bench: Bench) -> Figure:
    """Updates/s of 4 fresh and 4 replayed over those of 8 fresh, while an engine that decodes few
    at a time takes four times as long as the learner."""
    task = replace(bench.text(), prompts=4)
    slow = {"rollout": {"engine": {"max_num_seqs": 2}}, "learner": {"threads": 1}}
    steps, ratios, shares = bench.sizes.replay_steps, [], []
    for _ in range(bench.sizes.rounds):
        fresh, mixed = (
            bench.ours(task, replayed, steps, changes=slow) for replayed in REPLAYED.values()
        )
        ratios.append(fresh.seconds / mixed.seconds)
        shares.append(fresh.seconds / busy(fresh))
    yield from spread("replay_rate", ratios)
    yield from spread("replay_generate_over_train", shares)


def busy(run: ours.OurRun) -> float:
    """Seconds of an update without waiting for groups."""
    return run.mean("time/step") - run.mean("time/learner_wait")


# -- to a target -----------------------------------------------------------------------------------


def seconds_to(rewards: Sequence[tuple[float, float]], target: float, window: int) -> float | None:
    """When the mean reward of ``window`` updates first is ``target``; None when it never is."""
    for end in range(window, len(rewards) + 1):
        if statistics.fmean(value for _, value in rewards[end - window : end]) >= target:
            return rewards[end - 1][0]
    return None


def target_digest(sizes: Sizes, threads: int) -> str:
    """Of what a run to the target depends on; equal digests are equal runs."""
    said = {"sizes": asdict(sizes), "threads": threads, "beta": BETA, "guesses": tasks.GUESSES}
    said["sft"] = [tasks.SFT_PROMPTS, tasks.SFT_LR, tasks.answer_text("red"), tasks.QUESTION]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def measure_target(bench: Bench, records: Records, seeds: Sequence[int], digest: str) -> None:
    """What the records lack, seed by seed and by turns."""
    sizes, commit = bench.sizes, commit_of_code()
    task = replace(bench.image(), fixed=False)
    missing = [
        (seed, arm) for seed in seeds for arm in TARGET_ARMS if not records.get(arm, seed, digest)
    ]
    best = bench.best_rows(task, sizes.image_rows)[0] if missing else 0
    for seed, arm in missing:
        seeded, load = replace(task, seed=seed), os.getloadavg()[0]
        run: theirs.TrlRun | ours.OurRun
        if arm == "trl":
            until = {"until": sizes.target, "window": sizes.window}
            run = bench.trl(seeded, best, sizes.target_steps, **until)
        else:
            run = bench.ours(
                seeded,
                REPLAYED[arm],
                sizes.target_steps,
                until=lambda run: seconds_to(run.rewards(), sizes.target, sizes.window) is not None,
            )
        rewards = run.rewards()
        reached = seconds_to(rewards, sizes.target, sizes.window)
        curve = [[round(at, 2), round(value, 3)] for at, value in rewards]
        found = {"seconds": reached, "target": sizes.target, "trl_rows": best, "load": load}
        if reached is not None:
            curve = [point for point in curve if point[0] <= reached + 0.01]
            found["updates"] = len(curve)
        records.add(
            {"arm": arm, "seed": seed, "digest": digest, "commit": commit, **found, "curve": curve}
        )
        print(f"{arm} seed {seed}: {reached} s to {sizes.target}", flush=True)


def report_target(records: Records, seeds: Sequence[int], digest: str) -> Figure:
    """Of the newest record of each side and seed; a side that did not reach the target has no
    seconds, and its seed no ratio."""
    found = {(one["arm"], one["seed"]): one for one in records.newest(TARGET_ARMS, seeds)}
    old = [one for one in found.values() if one["digest"] != digest]
    for one in old:
        print(f"STALE, other settings than today's: {one['arm']} seed {one['seed']}")
    yield "image_target_stale_records", len(old)
    for arm in TARGET_ARMS:
        runs = [found[arm, seed] for seed in seeds if (arm, seed) in found]
        reached = [one for one in runs if one["seconds"] is not None]
        yield f"image_target_seeds_{arm}", len(runs)
        yield f"image_target_reached_{arm}", len(reached)
        if reached:
            yield f"image_target_s_{arm}", statistics.median(one["seconds"] for one in reached)
            yield f"image_target_updates_{arm}", statistics.median(o["updates"] for o in reached)
    for arm, name in (("fresh", "image_target_speedup"), ("mixed", "image_target_speedup_mixed")):
        pairs = [
            (found["trl", seed]["seconds"], found[arm, seed]["seconds"])
            for seed in seeds
            if ("trl", seed) in found and (arm, seed) in found
        ]
        if ratios := [other / own for other, own in pairs if other and own]:
            yield from spread(name, ratios)


def measure(bench: Bench, which: Sequence[str], options: argparse.Namespace) -> Figure:
    sizes = bench.sizes
    if "text" in which:
        yield from against_trl(bench, bench.text(), sizes.text_rows, sizes.text_steps)
    if "image" in which:
        yield from against_trl(bench, bench.image(), sizes.image_rows, sizes.image_steps)
    if "replay" in which:
        yield from replay(bench)
    if "target" in which:
        records, digest = Records(RECORDS / "loop.jsonl"), target_digest(Sizes(), bench.threads)
        if options.run:
            measure_target(bench, records, SEEDS, digest)
        yield from report_target(records, SEEDS, digest)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--run", action="store_true", help="measure what the records lack")
    options_of.add_argument("--only", choices=PARTS, action="append", help="some of the parts")
    options_of.add_argument("--rounds", type=int, help="turns per ratio")
    options = options_of.parse_args(arguments)
    sizes, folder = (SMOKE, options.out / "loop") if options.smoke else (Sizes(), FOLDER)
    if options.rounds:
        sizes = replace(sizes, rounds=options.rounds)
    which = options.only or (SMOKE_PARTS if options.smoke else PARTS)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    figures = Figures("loop", options.out)
    for item in measure(Bench(folder, sizes, threads), which, options):
        figures.add(dict([item]))
    figures.write()


if __name__ == "__main__":
    main()
