"""One arm with one seed as a real run in a process of its own, and what is kept of it: a JSON
line."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    Datasets,
    cold_start_folder,
    prepare_base_model,
    prepare_datasets,
)
from avatar_rl.cluster.recipe.load import check, load_recipe
from avatar_rl.cluster.recipe.overlays import Overlay, merge
from avatar_rl.cluster.recipe.presets import stated
from avatar_rl.cluster.recipe.ready_start import ready_start
from avatar_rl.cluster.telemetry.distributions import total
from avatar_rl.cluster.telemetry.live_view import open_screen
from avatar_rl.cluster.telemetry.run_files import read_distributions, read_metrics
from avatar_rl.cluster.training.evaluate import evaluate
from avatar_rl.common.errors import AvatarError, ResourceError
from avatar_rl.common.files import read_jsonl
from avatar_rl.rewards.answers.accuracy import SOLVED

RECIPE = Path(__file__).with_name("recipe.yaml")
#: Finished runs, in the repository: what a fresh clone reports.
RECORDS = Path(__file__).parents[1] / "records"


@dataclass(frozen=True)
class Arm:
    """One method: a preset, and what is set on top of it."""

    preset: str
    over: Overlay = field(default_factory=dict)
    untrained: bool = False  # begins from the model before its cold start


@dataclass(frozen=True)
class Pool:
    """The training prompts of a study, few enough that they come back, and held-out ones of the
    same kinds."""

    categories: tuple[str, ...]
    train: int
    heldout: int


@dataclass(frozen=True)
class Ground:
    """What every run of a study begins with; all exist on disk."""

    raw: Overlay  # its recipe
    start: Path  # the cold-started policy
    untrained: Path  # the model before its cold start
    train: Path
    heldout: Path
    media: Path  # folder that the prompts' media are relative to


def base_recipe(pool: Pool, cache: Path, folder: Path, recipe: Path = RECIPE) -> Overlay:
    """The study's recipe: from its cold start, on the pool, generation and learning in turn."""
    return on_ground(prepare_ground(pool, cache, folder, recipe), cache)


def prepare_ground(pool: Pool, cache: Path, folder: Path, recipe: Path = RECIPE) -> Ground:
    """Makes what is not there yet: world, pool, cold start."""
    local = load_recipe(recipe, [("output.cache", str(cache))])
    datasets, base = prepare_datasets(local, print), prepare_base_model(local, print)
    folder.mkdir(parents=True, exist_ok=True)
    start = cold_start(local, base, datasets, folder)
    assert datasets.heldout is not None
    return Ground(
        raw=yaml.safe_load(recipe.read_text()),
        start=start,
        untrained=prepare_base_model(local.model_copy(update={"cold_start": None}), print),
        train=_select(datasets.train, folder / "pool.jsonl", pool.categories, pool.train),
        heldout=_select(datasets.heldout, folder / "heldout.jsonl", pool.categories, pool.heldout),
        media=datasets.train.parent.resolve(),
    )


def on_ground(ground: Ground, cache: Path) -> Overlay:
    """The recipe of every run on ``ground``, without what an arm sets."""
    kept = {k: v for k, v in ground.raw.items() if k not in ("preset", "cold_start")}
    return merge(
        kept,
        {
            "name": "study",
            "model": {"path": str(ground.start)},
            "data": {
                "synthetic": None,
                "train": str(ground.train),
                "heldout": str(ground.heldout),
                "reader": {"media_root": str(ground.media)},
            },
            "loop": {"max_staleness": 0},
            "learner": {"schedule": "constant", "warmup": 0.0},
            "evaluation": {"every": 0, "pool": {"every": 1}},
            "probe": {"prompts": 0},
            "output": {"cache": str(cache), "samples_every": 0, "export": False, "report": False},
            "screen": "plain",
        },
    )


def cold_start(local: RunConfig, base: Path, datasets: Datasets, folder: Path) -> Path:
    """The recipe's own where it is ready; else from the cache, trained first (about 5 minutes)
    where it has none."""
    if local.cold_start is None:  # the model that it names has one behind it
        return base
    if (ready := ready_start(local)) is not None:
        return ready
    assert datasets.sft is not None
    start = cold_start_folder(local, base, datasets.sft).resolve()
    if not start.is_dir():
        output = local.output.model_copy(update={"folder": folder / "start"})
        with open_screen("auto", 1, title="cold start") as screen:
            evaluate(local.model_copy(update={"output": output}), screen)
    return start


def _select(source: Path, path: Path, categories: Sequence[str], count: int) -> Path:
    """The first ``count`` prompts of the question types, one of each in turn, as a dataset of its
    own."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for line in source.read_text().splitlines():
        by_category[json.loads(line)["category"]].append(line)
    ranks = range(max(len(by_category[name]) for name in categories))
    rows = [
        by_category[name][rank]
        for rank in ranks
        for name in categories
        if rank < len(by_category[name])
    ]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text("".join(row + "\n" for row in rows[:count]))
    return temporary.replace(path).resolve()


def resolve(base: Overlay, arm: Arm, seed: int, cap: int | None = None) -> RunConfig:
    """The arm's checked configuration, with as many steps as ``cap`` completions take. Raises
    ConfigError."""
    raw = merge(merge(base, stated(arm.preset)), arm.over)
    raw = merge(raw, {"seed": seed, "preset": arm.preset})
    config = check(raw, source=f"arm {arm.preset}")
    if cap is None:
        return config
    steps = -(-cap // (config.loop.prompts_per_step * config.loop.fresh))
    return check(merge(raw, {"loop": {"steps": steps}}), source=f"arm {arm.preset}")


def measured(
    base: Overlay, arm: Arm, seed: int, cap: int, *, between: int, pool: Overlay
) -> RunConfig:
    """The arm's checked configuration, whose pool is measured after every ``between`` completions
    (whole steps). Raises ConfigError."""
    loop = resolve(base, arm, seed).loop
    every = max(1, between // (loop.prompts_per_step * loop.fresh))
    return resolve(merge(base, {"evaluation": {"pool": {**pool, "every": every}}}), arm, seed, cap)


def digest(config: RunConfig) -> str:
    """Of everything that may change a run's outcome: equal digests are equal runs. Where files lie
    is left out."""
    settings = config.model_dump(
        mode="json", exclude={"output", "screen", "name", "seed", "model", "resources"}
    )
    data = settings["data"]
    for name in ("train", "heldout"):
        data[name] = hashlib.sha256(Path(data[name]).read_bytes()).hexdigest()
    data["reader"].pop("media_root")
    settings["start"] = hashlib.sha256(
        (Path(config.model.path) / "model.safetensors").read_bytes()
    ).hexdigest()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def recipe_digest(config: RunConfig, ground: Overlay) -> str:
    """Of what the recipe says; what it leaves open is the code's, which the record's commit names.
    ``ground`` stands for its files, so that none has to be there."""
    settings = config.model_dump(
        mode="json",
        exclude={"output", "screen", "name", "seed", "model", "resources"},
        exclude_unset=True,
    )
    for key in ("train", "heldout", "reader"):
        settings["data"].pop(key)
    settings |= ground
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def perform(config: RunConfig, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Train in a process of its own (behind ``prefix``, a command) and boil its run folder down to
    a record.

    Raises ResourceError with the end of the output of a run that failed.
    """
    with tempfile.TemporaryDirectory(prefix="avatar-study-") as name:
        folder = Path(name)
        plain = config.model_dump(mode="json")
        plain["output"]["folder"] = str(folder / "runs")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
        command = [
            *prefix,
            sys.executable,
            "-m",
            "avatar_rl.cluster.cli",
            "train",
            str(folder / "recipe.yaml"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ResourceError(
                f"study run ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        [run] = (folder / "runs").iterdir()
        rows = read_metrics(run)
        found = boil_down(rows, read_distributions(run))
        if solved := solved_curve(rows, samples_of(run)):
            found["solved"] = solved
        return found


def perform_all(
    todo: Sequence[tuple[str, int, RunConfig]],
    records: Records,
    workers: int,
    key_of: Callable[[RunConfig], str],
    *,
    minutes: float = math.inf,
    beside: Mapping[str, Any] | None = None,
    keep_crashes: bool = False,
) -> list[str]:
    """Perform what the records do not have; returns what failed.

    Nothing is begun after ``minutes``. Every record gets the fields ``beside``. With
    ``keep_crashes`` a run that fails is recorded by the end of its output (field ``crashed``), and
    repeated by the next call.
    """
    started, commit = time.monotonic(), commit_of_code()

    def one(job: tuple[str, int, RunConfig]) -> str | None:
        name, seed, config = job
        key = key_of(config)
        known = records.get(name, seed, key)
        if known is not None and "crashed" not in known:
            return None
        if time.monotonic() - started > 60 * minutes:
            return None
        about = {"arm": name, "seed": seed, "digest": key, "commit": commit, **(beside or {})}
        try:
            found: dict[str, Any] = perform(config)
        except AvatarError as error:
            print(f"{name} seed {seed} FAILED: {error}", flush=True)
            if keep_crashes:
                records.add({**about, "crashed": str(error)[-1000:]})
            return f"{name} seed {seed}"
        records.add({**about, **found})
        completions, *_, accuracy = found["curve"][-1]
        spent = (time.monotonic() - started) / 60
        print(
            f"{spent:5.1f} min  {name:16s} seed {seed}: {accuracy:.3f} at {completions:.0f} "
            "completions",
            flush=True,
        )
        return None

    with ThreadPoolExecutor(workers) as pool:
        return [failed for failed in pool.map(one, todo) if failed]


def commit_of_code() -> str:
    """The commit of the code that runs, with a "+" where files were changed; "unknown" without
    git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=RECORDS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def boil_down(
    rows: Sequence[dict[str, Any]], shapes: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """What the study keeps of ``read_metrics``' and ``read_distributions``' rows.

    ``curve`` has per measurement of the pool [completions, tokens generated, wall s, learner s,
    optimiser updates, accuracy]; the seconds are of training, without start-up and measuring.
    ``dead`` and ``dead_after`` are the mean shares of fresh and of mixed groups without signal;
    ``heldout`` is the accuracy before and after; ``distributions`` are sums over all steps."""
    curve: list[list[float]] = []
    wall = learner = updates = completions = tokens = 0.0
    steps = [row for row in rows if row.get("completions/generated") is not None]
    for row in rows:
        if row.get("completions/generated") is not None:
            completions, tokens = row["completions/generated"], row["tokens/generated"]
            wall += row["time/step"]
            learner += sum(row.get(f"time/{part}") or 0.0 for part in LEARNER_PARTS)
            updates += row["learner/updates"]
        if row.get("pool/accuracy") is not None:
            curve.append(
                [
                    completions,
                    tokens,
                    round(wall, 3),
                    round(learner, 3),
                    updates,
                    row["pool/accuracy"],
                ]
            )
    heldout = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    tiers = [
        [row.get(f"tiers/{tier}") or 0.0 for tier in ("hard", "medium", "easy")] for row in steps
    ]
    return {
        "curve": curve,
        "heldout": [heldout[0], heldout[-1]] if heldout else [],
        "dead": _mean(steps, "groups/dead_before"),
        "dead_after": _mean(steps, "groups/dead_after"),
        "dead_curve": [
            [row["completions/generated"], row.get("groups/dead_before")] for row in steps
        ],
        "tiers": tiers,
        "hinted": sum(row.get("hints/visits") or 0.0 for row in steps),
        "kl_reference": steps[-1].get("kl/reference") if steps else None,
        "entropy": steps[-1].get("entropy") if steps else None,
        "distributions": {
            name: [round(value, 4) for value in values.tolist()]
            for name in sorted({name for row in shapes for name in row} - {"step"})
            if (values := total(shapes, name)) is not None
        },
    }


def samples_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> its saved training completions."""
    files = sorted((run / "samples").glob("step_*.jsonl"))
    return {int(file.stem.partition("_")[2]): list(read_jsonl(file)) for file in files}


def solved_curve(
    rows: Sequence[dict[str, Any]], samples: Mapping[int, Sequence[dict[str, Any]]]
) -> list[list[float]]:
    """[completions, prompts that any training completion had answered right by then], per step.

    Right only where the samples hold every group of every step."""
    curve: list[list[float]] = []
    solved: set[str] = set()
    for row in rows:
        if row.get("completions/generated") is None or row["step"] not in samples:
            continue
        for one in samples[row["step"]]:
            if (one["components"].get("accuracy") or 0.0) >= SOLVED:
                solved.add(one["prompt_id"])
        curve.append([row["completions/generated"], len(solved)])
    return curve


LEARNER_PARTS = ("encode", "forward_backward", "optimizer", "publish")


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


class Records:
    """Finished runs in a file of JSON lines, found by (arm, seed, digest)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[tuple[str, int, str], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            self._keep(json.loads(line))

    def get(self, arm: str, seed: int, digest: str) -> dict[str, Any] | None:
        return self._found.get((arm, seed, digest))

    def newest(self, arms: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The last record of each arm and seed, whatever its settings were."""
        last = {(arm, seed): record for (arm, seed, _), record in self._found.items()}
        wanted = [(arm, seed) for seed in seeds for arm in arms]
        return [last[key] for key in wanted if key in last]

    def all(self) -> list[dict[str, Any]]:
        return list(self._found.values())

    def refuse_others(self, fields: Mapping[str, str]) -> None:
        """Raises SystemExit where the file holds runs of another protocol or from another cold
        start: they cannot stand in one table."""
        for one in self.all():
            for name, ours in fields.items():
                if one[name] != ours:
                    raise SystemExit(
                        f"{self.path}: {one['arm']} seed {one['seed']} (commit {one['commit']}) "
                        f"has {name} {one[name]}, here it is {ours}: measure into another file "
                        "(--records FILE), or move this one away"
                    )

    def add(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        key = (record["arm"], record["seed"], record["digest"])
        self._found.pop(key, None)  # the last in the file is the last here
        self._found[key] = record


def report_or_run(
    options: argparse.Namespace,
    records: Records,
    todo: Callable[[], Sequence[tuple[str, int, RunConfig]]],
    arms: Sequence[str],
    seeds: Sequence[int],
    key_of: Callable[[RunConfig], str] | None = None,
) -> list[dict[str, Any]]:
    """The records to report; with ``--run`` what is missing is measured first. Raises SystemExit
    when there are none, or when runs failed."""
    key_of = key_of or digest
    if options.run:
        jobs = todo()
        if failed := perform_all(jobs, records, options.workers, key_of):
            raise SystemExit(
                f"{len(failed)} runs failed ({', '.join(failed)}): start again to repeat them"
            )
        done = (records.get(name, seed, key_of(config)) for name, seed, config in jobs)
        return [record for record in done if record is not None]
    found = records.newest(arms, seeds)
    if not found:
        raise SystemExit(
            f"no records of these runs in {records.path}; --run measures all "
            f"{len(arms) * len(seeds)} (minutes each, about one core a run)"
        )
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """What study and sweeps have in common."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--report", action="store_true", help="of the records kept; the default")
    action.add_argument("--run", action="store_true", help="measure what is missing, then report")
    parser.add_argument("--publish", action="store_true", help="tables and figures into docs/")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the report's")
    parser.add_argument(
        "--workers", type=int, default=2, help="runs at a time; each keeps about one core busy"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("build/cache"), help="where the cold start is"
    )
