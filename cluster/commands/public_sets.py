"""`avatar evaluate --benchmark`: public sets asked of a checkpoint, and their table."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from avatar_rl.cluster.recipe.load import parse_overrides, read_recipe, resolve_recipe
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import JsonObject
from avatar_rl.common.weight_files import fingerprint

if TYPE_CHECKING:
    from avatar_rl.cluster.benchmarks.convert import Wording
    from avatar_rl.cluster.benchmarks.record import BenchmarkSet
    from avatar_rl.cluster.benchmarks.result import SetResult, SetToAsk
    from avatar_rl.cluster.config import RunConfig
    from avatar_rl.common.config import Section
    from avatar_rl.prompts.record import Modality


class PublicSetWords(TypedDict):
    """The options of `avatar evaluate` that are for public sets, as they were typed."""

    benchmark: str | None
    sets: Path  # holds a folder for each set
    out: Path | None
    wording: Wording
    limit: int | None
    skip_missing: bool
    table: bool


def list_sets() -> int:
    from avatar_rl.cluster.benchmarks.sets import benchmark_sets

    for one in benchmark_sets().values():
        print(f"{one.name:<20} {one.title:<20} {'+'.join(one.senses):<12} {one.paper}")
    return 0


def evaluate_sets(
    model: Path, recipe: Path, overrides: Sequence[str], words: PublicSetWords
) -> int:
    """Answer the sets, print their figures. Every file is read before a process starts.

    Raises ConfigError for an unknown set or a model that lacks a sense a set needs, InputError for
    files that are not as published."""
    from avatar_rl.cluster.benchmarks.convert import senses_of
    from avatar_rl.cluster.benchmarks.sets import benchmark_set
    from avatar_rl.cluster.commands.doctor import preflight
    from avatar_rl.cluster.commands.train import policy_folder
    from avatar_rl.cluster.telemetry.live_view import open_screen
    from avatar_rl.cluster.training.public_sets import ask_sets

    names = [name.strip() for name in (words["benchmark"] or "").split(",") if name.strip()]
    chosen = [benchmark_set(name) for name in dict.fromkeys(names)]
    out = words["out"] or Path("evaluations") / model.resolve().name
    model = policy_folder(model)
    config = _config(model, recipe, overrides)
    senses = senses_of(model)
    sets = _sets_to_ask(chosen, config, model, senses, words, out)
    preflight({"": config})
    with open_screen(config.screen, 1, title="evaluate") as screen:
        results = ask_sets(
            config, model, sets, screen, wording=words["wording"], hears="audio" in senses
        )
    for one, result in zip(chosen, results, strict=True):
        _print_result(one, result)
    print(f"every answer   {out}")
    return 0


def _sets_to_ask(
    chosen: Sequence[BenchmarkSet],
    config: RunConfig,
    model: Path,
    senses: set[Modality],
    words: PublicSetWords,
    out: Path,
) -> list[SetToAsk]:
    """The sets with their questions and the answers of an earlier start.

    No answer's folder is touched before every set is known to be complete and to suit the model."""
    from avatar_rl.cluster.benchmarks.answers import AnswerStore
    from avatar_rl.cluster.benchmarks.convert import check_kinds, lacking, read_questions
    from avatar_rl.cluster.benchmarks.result import SetToAsk

    for one in chosen:
        _check_senses(one, lacking(one, senses), model)
    limit, skip = words["limit"], words["skip_missing"]
    read = [
        read_questions(
            one, words["sets"] / one.name, out / "media" / one.name, limit=limit, skip=skip
        )
        for one in chosen
    ]
    for one, (questions, _) in zip(chosen, read, strict=True):
        check_kinds(one, questions, senses, model)
    asked = asked_with(config, model, words["wording"])
    return [
        SetToAsk(one, questions, left_out, AnswerStore(out / one.name, asked, questions))
        for one, (questions, left_out) in zip(chosen, read, strict=True)
    ]


def _print_result(one: BenchmarkSet, result: SetResult) -> None:
    """A set's figures; what could not be asked goes to stderr."""
    interval, accuracy = result.intervals["accuracy"], result.figures["accuracy"]
    print(
        f"{one.title:<20} {100 * accuracy:5.1f} %  "
        f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]  "
        f"{result.answered} answers, {result.mean_tokens:.0f} tokens each"
    )
    for name, value in list(result.figures.items())[1:]:
        within = result.intervals.get(name)
        shown = f" [{within.low:.3f}, {within.high:.3f}]" if within is not None else ""
        print(f"  {name:<40} {value:.3f}{shown}")
    if one.deviation:
        print(f"  note: {one.deviation}")
    if result.not_asked:
        why = ", ".join(f"{count} x {reason}" for reason, count in result.reasons.items())
        print(
            f"  {result.not_asked} questions were not asked and are not counted "
            f"({why or 'their media are missing'})",
            file=sys.stderr,
        )


#: Keys of the sections that are put on record which do not change an answer: how rows are read,
#: where media lie, caches, how much is computed at once.
_NO_MATTER: Mapping[str, set[str]] = {
    "reader": {
        *("format", "split", "problem_type", "limit", "media_root", "extract_to"),
        "ignore_columns",
    },
    "media": {"threads", "roots", "memory_cache_bytes", "disk_cache", "disk_cache_bytes"},
    "template": {"cache_bytes"},
    "engine": {
        *("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"),
        *("gpu_memory_utilization", "enforce_eager", "tensor_parallel_size", "block_size"),
        *("prompt_cache_bytes", "media_workers", "weight_update", "threads"),
    },
    # Public sets are asked greedily; the length is told by itself.
    "sampling": {"temperature", "top_p", "top_k", "max_tokens"},
}
#: Files of a model folder that say how it is asked: config, tokenizer, processor, chat template.
_ASKED_BY = (".json", ".jinja", ".txt", ".model")


def asked_with(config: RunConfig, model: Path, wording: Wording) -> JsonObject:
    """What answers depend on besides their questions, by the recipe's keys. Raises ModelError for a
    folder without weights."""
    files = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.suffix in _ASKED_BY and file.is_file():
            files.update(f"{file.name}:{file.stat().st_size}:".encode() + file.read_bytes())

    def kept(section: Section, name: str) -> JsonObject:
        found: JsonObject = section.model_dump(mode="json", exclude=_NO_MATTER[name])
        return found

    data, rollout = config.data, config.rollout
    return {
        "model": {
            "path": str(model.resolve()),
            "weights": fingerprint(model)[:16],
            "files": files.hexdigest()[:16],
        },
        "wording": wording,
        "data": {
            "reader": kept(data.reader, "reader"),
            "media": kept(data.media, "media"),
            "template": kept(data.template, "template"),
        },
        "rollout": {
            "engine": kept(rollout.engine, "engine"),
            "sampling": kept(rollout.sampling, "sampling"),
        },
        "evaluation": {
            "max_tokens": config.evaluation.max_tokens or rollout.sampling.max_tokens,
        },
    }


def _config(model: Path, recipe: Path, overrides: Sequence[str]) -> RunConfig:
    from avatar_rl.cluster.commands.train import CURRICULUM_KEYS

    raw = read_recipe(recipe)
    common = {name: value for name, value in raw.items() if name not in CURRICULUM_KEYS}
    config = resolve_recipe(common, parse_overrides(overrides), source=str(recipe))
    # Answers are marked by the sets' own rules, so no judge is asked for a reward.
    rewards = config.rewards.model_copy(update={"weights": {"accuracy": 1.0}})
    policy = config.model.model_copy(update={"path": str(model)})
    return config.model_copy(
        update={"name": "evaluate", "cold_start": None, "model": policy, "rewards": rewards}
    )


def _check_senses(one: BenchmarkSet, lacks: Sequence[Modality], model: Path) -> None:
    if lacks:
        raise ConfigError(
            f"{one.name} is about {' and '.join(one.senses)}, and {model} takes no "
            f"{' and no '.join(lacks)}: its score would say nothing; leave the set out"
        )


def print_table(folders: Sequence[Path]) -> int:
    from avatar_rl.cluster.benchmarks.table import comparison

    print(comparison(folders))
    return 0
