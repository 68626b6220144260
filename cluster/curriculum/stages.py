"""A curriculum as it is written: one recipe whose `stages` follow one another (docs/method.md
1.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from avatar_rl.cluster.checkpoints.resume import HARMLESS, UNTIL
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets
from avatar_rl.cluster.recipe.content import key, model_digest
from avatar_rl.cluster.recipe.load import (
    against_preset,
    check,
    explain,
    over_preset,
    overridden,
    renamed,
)
from avatar_rl.cluster.recipe.overlays import Overlay, lay, merge
from avatar_rl.cluster.recipe.ready_start import ready_start
from avatar_rl.common.config import Section
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.files import sha256_of
from avatar_rl.common.types import Json
from avatar_rl.prompts.selection import SelectionConfig

#: What a stage's result does not depend on: what may change when a run resumes, but for how long it
#: trains and when it stops.
_IRRELEVANT = (*(name for name in HARMLESS if name not in UNTIL), "evaluation.timeout_s")


class StageConfig(Section):
    """One stage: what it changes of the recipe around it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names its folder and its column."
    )
    kind: Literal["sft", "rl"] = Field(
        "rl", description="'sft': the recipe's cold_start (Stage 0); 'rl': training."
    )
    preset: str | None = Field(None, description="Named overlay of this stage (`avatar presets`).")
    select: SelectionConfig = Field(
        SelectionConfig(), description="Which training prompts the stage asks."
    )
    steps: int | None = Field(None, ge=1, description="loop.steps of the stage.")
    target_accuracy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="End the stage once held-out accuracy on its own types reaches this.",
    )
    rewards: dict[str, JsonValue] = Field(
        {}, description="`rewards` section of the stage; its weights replace the recipe's."
    )
    start: Path | Literal["previous"] = Field(
        "previous",
        description="Checkpoint folder to start from; 'previous' is what the stage before made.",
    )
    replay: Literal["clear", "keep"] = Field(
        "clear",
        description="'keep': trajectories of the stage before stay replayable, under this stage's "
        "rewards.",
    )
    overrides: dict[str, JsonValue] = Field(
        {}, description="Any other sections of the recipe: data, learner, evaluation."
    )


@dataclass(frozen=True)
class Stage:
    """A stage with its resolved configuration; ``config.model`` is replaced by what it starts
    from."""

    name: str
    config: RunConfig
    is_sft: bool
    start: Path | None  # None: the stage before, or the recipe's model for the first
    keeps_replay: bool
    by_hand: tuple[str, ...] = ()  # what was given against its preset, a line each

    def digest(self, datasets: Datasets, parent: str) -> str:
        """Changes when anything the stage's result depends on does: settings, data, and ``parent``,
        the digest of the stage before (ignored with a checkpoint of its own)."""
        settings = self.config.model_dump(mode="json")
        if not self.is_sft:
            settings["cold_start"] = None
        elif (ready := ready_start(self.config)) is not None:
            settings["cold_start"] = {"ready": model_digest(ready)}
        else:
            settings["cold_start"].pop("ready")
        for name in _IRRELEVANT:
            _drop(settings, name)
        files = [
            file for file in (datasets.train, datasets.heldout, datasets.sft) if file is not None
        ]
        settings["data"] |= {"train": None, "heldout": None, "sft": None, "synthetic": None}
        return key(
            [
                self.name,
                settings,
                [_content(file) for file in files],
                self.origin(parent),
                self.keeps_replay,
            ]
        )

    def origin(self, parent: str) -> str:
        return parent if self.start is None else model_digest(self.start)


@dataclass(frozen=True)
class Curriculum:
    """All stages, in order; everything lands in ``folder``."""

    name: str
    folder: Path
    stages: tuple[Stage, ...]
    modality_check: bool


def resolve(
    raw: Overlay, overrides: Sequence[tuple[str, str]], *, preset_name: str | None, source: str
) -> Curriculum:
    """The checked stages of a recipe with `stages`. A stage's own keys lie over the recipe's, and
    these over one preset: the command line's for an RL stage, else the stage's, else the recipe's.
    The command line lies over every stage.

    Raises ConfigError naming recipe and stage for unknown keys, bad values, doubled names or a
    missing cold start."""
    common = {
        name: value for name, value in raw.items() if name not in ("stages", "modality_check")
    }
    common = renamed(common, source)
    entries = [_entry(item, number, source) for number, item in enumerate(_listed(raw, source))]
    names = [entry.name for entry in entries]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ConfigError(
            f"recipe {source}: stages {', '.join(sorted(doubled))} occur twice; give each its own "
            "name"
        )
    if common.get("cold_start") and not any(entry.kind == "sft" for entry in entries):
        raise ConfigError(
            f"recipe {source}: no stage runs its cold_start; add the stage {{name: sft, kind: "
            f"sft}} first"
        )
    modality_check = raw.get("modality_check", False)
    if not isinstance(modality_check, bool):
        raise ConfigError(
            f"recipe {source}: modality_check is {modality_check!r}; set true or false"
        )
    plain = check(overridden(over_preset(common, preset_name), overrides), source=source)
    folder = plain.output.folder / plain.name
    stages = [
        _stage(
            common, entry, overrides, preset_name, folder, source=f"{source}, stage {entry.name}"
        )
        for entry in entries
    ]
    if stages[0].keeps_replay:
        raise ConfigError(
            f"recipe {source}, stage {names[0]}: replay: keep needs a stage before it"
        )
    return Curriculum(plain.name, folder, tuple(stages), modality_check)


def _stage(
    common: Overlay,
    entry: StageConfig,
    overrides: Sequence[tuple[str, str]],
    preset_name: str | None,
    folder: Path,
    *,
    source: str,
) -> Stage:
    """One checked stage, whose runs land in ``folder``."""
    hand = _by_hand(common, entry, source)
    named = (preset_name if entry.kind == "rl" else None) or entry.preset
    raw = overridden(over_preset(hand, named), overrides)
    config = check(raw | {"cold_start": None} if entry.kind == "rl" else raw, source=source)
    if entry.kind == "sft" and config.cold_start is None:
        raise ConfigError(f"recipe {source}: kind sft needs a `cold_start` section")
    output = config.output.model_copy(update={"folder": folder, "export": True})
    start = None if entry.start == "previous" else Path(entry.start)
    if start is not None and not start.is_dir():
        raise ConfigError(f"recipe {source}: start {start} is not a checkpoint folder")
    return Stage(
        entry.name,
        config.model_copy(update={"name": entry.name, "output": output}),
        entry.kind == "sft",
        start,
        entry.replay == "keep",
        tuple(against_preset(overridden(hand, overrides), named)),
    )


def _by_hand(common: Overlay, entry: StageConfig, source: str) -> Overlay:
    """What recipe and stage give by hand."""
    raw = lay(common, renamed(entry.overrides, source))
    given = entry.model_dump(mode="json", exclude_unset=True)
    raw = merge(raw, {"data": {"select": given["select"]}} if "select" in given else {})
    loop = {"steps": entry.steps, "target_accuracy": entry.target_accuracy}
    raw = merge(raw, {"loop": {name: value for name, value in loop.items() if value is not None}})
    return lay(raw, {"rewards": entry.rewards})  # its weights replace the recipe's


def _listed(raw: Overlay, source: str) -> list[Json]:
    stages = raw.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"recipe {source}: stages must be a list of stages, each with a name")
    return stages


def _entry(item: Json, number: int, source: str) -> StageConfig:
    try:
        return StageConfig.model_validate(item)
    except ValidationError as error:
        lines = [explain(fault, root=StageConfig) for fault in error.errors()]
        name = item.get("name", number) if isinstance(item, dict) else number
        raise ConfigError(f"recipe {source}, stage {name}:\n  " + "\n  ".join(lines)) from error


def _drop(settings: Json, name: str) -> None:
    """Without the dotted key, if it is there."""
    head, _, rest = name.partition(".")
    if rest and isinstance(settings, dict):
        _drop(settings.get(head), rest)
    elif isinstance(settings, dict):
        settings.pop(head, None)


def _content(file: Path) -> str:
    """sha256 of a dataset file; a datasets folder goes by its files' names and sizes."""
    if file.is_dir():
        return key(
            sorted((str(part.relative_to(file)), part.stat().st_size) for part in file.rglob("*"))
        )
    return sha256_of(file)
