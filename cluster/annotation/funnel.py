"""`avatar data filter` and `avatar data balance`: which scored samples are kept, and the report of
how many are left after each step (docs/method.md 2.4)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.common.files import read_jsonl, replace_text, replaced_file
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.record import Prompt

TAXONOMY = "taxonomy"  # in Prompt.extra: the sample's category
NONE = "none"  # of none of the categories
_FULL = 10


@dataclass(frozen=True)
class Thresholds:
    """Least scores of a sample that is kept; the defaults are the authors' code's."""

    answer: int = 10
    logic: int = 8
    composite: int = 7
    video: int = 0
    audio: int = 0


def filter_dataset(dataset: Path, out: Path, least: Thresholds) -> dict[str, int]:
    """Write the samples that meet ``least`` to ``out``; how many each score dropped, first one
    first. Raises DataError for a sample without scores."""
    dropped: Counter[str] = Counter({name: 0 for name in vars(least)})
    kept: list[Prompt] = []
    for prompt in _read(dataset, out):
        scores = _scores(prompt, dataset)
        missed = next((n for n, limit in vars(least).items() if scores[n] < limit), None)
        if missed is None:
            kept.append(prompt)
        else:
            dropped[missed] += 1
    _write(out, kept)
    counts = {
        f"{name} below {limit}": dropped[name] for name, limit in vars(least).items() if limit
    }
    write_step("filter", dataset, out, counts)
    return counts


def balance_dataset(
    dataset: Path, out: Path, *, smallest: int = 10, cap: float = 3.0
) -> dict[str, int]:
    """Write a balanced part of classified samples to ``out``; how many each rule dropped.

    Samples of no category go, then categories of fewer than ``smallest``. The largest category is
    cut to ``cap`` times the second. Kept first are samples that need picture and sound entirely
    (both scores 10), then by the composite score; a hash of the id decides the rest, so a rerun
    keeps the same. Raises DataError for a sample without a category, ConfigError for a bound that
    keeps nothing."""
    if cap < 1 or smallest < 1:
        raise ConfigError(f"--cap {cap:g} must be at least 1, --smallest {smallest} at least 1")
    by_category: dict[str, list[Prompt]] = {}
    for prompt in _read(dataset, out):
        name = prompt.extra.get(TAXONOMY)
        if not isinstance(name, str):
            raise DataError(
                f"{dataset}: sample {prompt.id!r} has no category: run `avatar data classify` first"
            )
        by_category.setdefault(name, []).append(prompt)
    counts = {"no category": len(by_category.pop(NONE, []))}
    small = {name for name, samples in by_category.items() if len(samples) < smallest}
    counts[f"category below {smallest}"] = sum(len(by_category.pop(name)) for name in small)
    if not by_category:
        raise ConfigError(
            f"{dataset}: no category has {smallest} samples: lower --smallest, or classify by a "
            "coarser taxonomy"
        )
    sizes = sorted(map(len, by_category.values()), reverse=True)
    limit = int(cap * sizes[1]) if len(sizes) > 1 else sizes[0]
    kept: set[str] = set()
    for samples in by_category.values():
        kept |= {p.id for p in sorted(samples, key=_worth)[:limit]}
    counts[f"over {limit} of the largest"] = sum(sizes) - len(kept)
    _write(out, [p for samples in by_category.values() for p in samples if p.id in kept])
    write_step("balance", dataset, out, counts)
    return counts


def _worth(prompt: Prompt) -> tuple[bool, int, str]:
    """Sorts what is worth most first."""
    scores = prompt.extra.get("scores")
    found = scores if isinstance(scores, dict) else {}
    needs_both = found.get("video") == found.get("audio") == _FULL
    composite = found.get("composite")
    digest = hashlib.sha256(prompt.id.encode()).hexdigest()
    return not needs_both, -composite if isinstance(composite, int) else 0, digest


def _scores(prompt: Prompt, dataset: Path) -> dict[str, int]:
    scores = prompt.extra.get("scores")
    names = Thresholds().__dict__.keys()
    if not isinstance(scores, dict) or not all(isinstance(scores.get(n), int) for n in names):
        raise DataError(
            f"{dataset}: sample {prompt.id!r} has no scores: run `avatar data score` first"
        )
    return {name: int(str(scores[name])) for name in names}


def _read(dataset: Path, out: Path) -> Iterable[Prompt]:
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: samples are written as .jsonl; choose that suffix")
    if out.resolve() == dataset.resolve():
        raise ConfigError(f"--out {out} is the dataset itself: choose another file")
    return PromptIndex.read([dataset], DataConfig())


def _write(out: Path, prompts: Sequence[Prompt]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(out) as beside, beside.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(prompt.model_dump_json(exclude_defaults=True) + "\n")


# -- the report ------------------------------------------------------------------------------------


def report_of(dataset: Path) -> Path:
    """Where the funnel up to ``dataset`` is written."""
    return dataset.with_name(f"{dataset.stem}.funnel.json")


def write_step(step: str, dataset: Path, out: Path, dropped: Mapping[str, int]) -> None:
    """Writes the report of ``out``: that of ``dataset``, and this step."""
    before = report_of(dataset)
    steps = json.loads(before.read_text()) if before.is_file() else []
    left = sum(1 for _ in read_jsonl(out))
    counts = {reason: count for reason, count in dropped.items() if count}
    steps.append({"step": step, "file": out.name, "left": left, "dropped": counts})
    replace_text(report_of(out), json.dumps(steps, indent=2) + "\n")


def print_funnel(dataset: Path) -> int:
    """The steps that made ``dataset``, with what each left and dropped. Raises DataError where no
    step made it."""
    path = report_of(dataset)
    if not path.is_file():
        raise DataError(
            f"{dataset} has no {path.name} beside it: it is no result of `avatar data score`, "
            "`classify`, `filter` or `balance`"
        )
    table = Table("step", "file", "left", "dropped", box=None)
    for step in json.loads(path.read_text()):
        why = ", ".join(f"{count:,} {reason}" for reason, count in step["dropped"].items())
        table.add_row(step["step"], step["file"], f"{step['left']:,}", why or "nothing")
    Console(highlight=False).print(table)
    return 0
