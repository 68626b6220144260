"""What is known of a curriculum's stages: the content of `stages.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from avatar_rl.cluster.curriculum.stages import Stage
from avatar_rl.cluster.training.evaluation import Evaluation
from avatar_rl.common.errors import DataError

STATE = "stages.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Result(Record):
    """One held-out evaluation; accuracies in [0, 1]."""

    accuracy: float
    prompts: int
    selected: float | None = None  # on the types the stage trains
    by_category: dict[str, float] = {}
    by_need: dict[str, float] = {}

    @classmethod
    def of(cls, evaluation: Evaluation) -> Result:
        return cls(**{name: getattr(evaluation, name) for name in cls.model_fields})


class StageRecord(Record):
    """A finished stage."""

    name: str
    kind: Literal["sft", "rl"]
    digest: str  # of all that its result depends on
    trains: str  # the types it selects, in words
    categories: tuple[str, ...] = ()
    run: str
    checkpoint: str
    before: Result | None = None
    after: Result | None = None
    completions: int = 0
    seconds: float = 0.0
    finished: float = 0.0  # Unix seconds

    @classmethod
    def of(
        cls,
        stage: Stage,
        digest: str,
        run: Path,
        checkpoint: Path,
        before: Evaluation | None,
        after: Evaluation | None,
        *,
        completions: int = 0,
        seconds: float,
    ) -> StageRecord:
        chosen = stage.config.data.select
        return cls(
            name=stage.name,
            kind="sft" if stage.is_sft else "rl",
            digest=digest,
            trains="cold start" if stage.is_sft else str(chosen),
            categories=() if stage.is_sft else chosen.categories,
            run=str(run.resolve()),
            checkpoint=str(checkpoint),
            before=None if before is None else Result.of(before),
            after=None if after is None else Result.of(after),
            completions=completions,
            seconds=round(seconds, 1),
            finished=round(time.time(), 1),
        )


class Underway(Record):
    """A stage that has begun and has no result yet."""

    name: str
    digest: str  # as its record will have it
    run: str  # folder


class CurriculumState(Record):
    """Finished stages in the order of the curriculum, the one under way, and the last policy
    without a sense."""

    stages: list[StageRecord] = []
    underway: Underway | None = None
    modalities: dict[str, Result] = {}

    def get(self, name: str) -> StageRecord | None:
        return next((record for record in self.stages if record.name == name), None)

    def begun(self, name: str, digest: str) -> Path | None:
        """Run folder of a stage that was interrupted, if settings, data and start are still those
        it began with."""
        found = self.underway
        if found is None or (found.name, found.digest) != (name, digest):
            return None
        return Path(found.run) if (Path(found.run) / "status.json").is_file() else None

    def drop_from(self, names: Collection[str]) -> None:
        """Forget stages that are to be made anew, and what was measured at the end."""
        self.stages = [record for record in self.stages if record.name not in names]
        self.modalities = {}


def read_state(folder: Path) -> CurriculumState:
    """What ``stages.json`` of a curriculum folder says; empty for a new one. Raises DataError for a
    damaged file."""
    file = folder / STATE
    if not file.is_file():
        return CurriculumState()
    try:
        return CurriculumState.model_validate(json.loads(file.read_text()))
    except ValueError as error:
        raise DataError(
            f"{file} is damaged ({error}): delete it to run all stages again"
        ) from error
