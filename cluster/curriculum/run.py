"""Runs the stages of a curriculum in series, each from what the one before made.

Finished stages are not run again; one that was interrupted resumes from its last checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.checkpoints.resume import resumable
from avatar_rl.cluster.curriculum.record import (
    STATE,
    CurriculumState,
    Result,
    StageRecord,
    Underway,
    read_state,
)
from avatar_rl.cluster.curriculum.report import write_stage_report
from avatar_rl.cluster.curriculum.stages import Curriculum, Stage
from avatar_rl.cluster.recipe.assets import (
    Datasets,
    check_fusion,
    check_hints,
    prepare_datasets,
    read_prompts,
)
from avatar_rl.cluster.telemetry.live_view import open_screen
from avatar_rl.cluster.telemetry.phase_times import times_of
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluate import Kinds, PolicyResult, evaluate
from avatar_rl.cluster.training.replay_import import carry_over
from avatar_rl.cluster.training.restarts import run_to_end
from avatar_rl.common.errors import AvatarError, ConfigError, DataError
from avatar_rl.common.files import replace_text
from avatar_rl.prompts.selection import select
from avatar_rl.rewards.actor import check_judge

#: What a plan says of a stage that is to be run.
RUNS = ("run", "resume")
#: Senses taken away after the last stage, one set at a time.
MODALITY_CHECK: tuple[Kinds, ...] = (("audio",), ("video",))


class CurriculumRun:
    """One curriculum folder: ``execute`` brings it up to date."""

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self.state = read_state(curriculum.folder)
        self._datasets: dict[str, Datasets] = {}

    def prepare(self) -> None:
        """Datasets, selections, hints and judges of all stages are checked before any of them
        starts.

        Raises DataError, ConfigError or ResourceError naming the stage.
        """
        for stage in self.curriculum.stages:
            try:
                self._check(stage)
            except AvatarError as error:
                raise type(error)(f"stage {stage.name}: {error}") from error

    def _check(self, stage: Stage) -> None:
        config = stage.config
        datasets = prepare_datasets(
            config, lambda phase, detail: print(f"{phase}: {detail}", flush=True)
        )
        self._datasets[stage.name] = datasets
        if stage.is_sft:
            return
        train = read_prompts(datasets.train, config)
        check_hints(train, config)
        check_fusion(train, config)
        select(train, config.data.select)
        if config.loop.target_accuracy is not None:
            if datasets.heldout is None:
                raise DataError("target_accuracy is checked on held-out prompts: set data.heldout")
            select(read_prompts(datasets.heldout, config), config.data.select)
        check_judge(config.rewards)

    def plan(self, *, only: str | None = None, first: str | None = None) -> list[tuple[Stage, str]]:
        """Every stage with what will be done about it: "run", "resume", "done before" or "not asked
        for".

        Raises ConfigError for an unknown stage name, and for one whose predecessor has no result.
        """
        names = [stage.name for stage in self.curriculum.stages]
        for name in (only, first):
            if name is not None and name not in names:
                raise ConfigError(
                    f"curriculum {self.curriculum.name} has no stage {name!r}: it has "
                    f"{', '.join(names)}"
                )
        wanted = set(names if only is None else [only])
        if first is not None:
            wanted = set(names[names.index(first) :])
        plan, parent, fresh = [], "", False
        for stage in self.curriculum.stages:
            record = self.state.get(stage.name)
            if stage.name not in wanted:
                plan.append((stage, "not asked for"))
                parent = record.digest if record is not None else ""
                continue
            digest = stage.digest(self._datasets[stage.name], parent)
            forced = only is not None or first == stage.name
            known = (
                record is not None and record.digest == digest and Path(record.checkpoint).is_dir()
            )
            fresh = fresh or forced or not known
            # a stage that runs before this one makes something else to start from
            after_one = any(before in RUNS for _, before in plan)
            has_begun = self.state.begun(stage.name, digest) is not None
            action = "resume" if has_begun and not after_one else "run"
            plan.append((stage, action if fresh else "done before"))
            parent = digest
        self._check_start(plan)
        return plan

    def _check_start(self, plan: Sequence[tuple[Stage, str]]) -> None:
        previous: tuple[Stage, str] | None = None
        for stage, action in plan:
            if (
                action in RUNS
                and stage.start is None
                and previous is not None
                and previous[1] not in RUNS
            ):
                record = self.state.get(previous[0].name)
                if record is None or not Path(record.checkpoint).is_dir():
                    raise ConfigError(
                        f"stage {stage.name} starts from stage {previous[0].name}, which has no "
                        f"checkpoint in {self.curriculum.folder}: run that first, or give --start "
                        "CHECKPOINT"
                    )
            previous = (stage, action)

    def execute(self, *, only: str | None = None, first: str | None = None) -> CurriculumState:
        """Run what is to be run; after every stage ``stages.json`` and the report are up to
        date."""
        self.prepare()
        plan = self.plan(only=only, first=first)
        self.curriculum.folder.mkdir(parents=True, exist_ok=True)
        parent, before = "", None
        for number, (stage, action) in enumerate(plan, 1):
            print(f"stage {number}/{len(plan)} {stage.name}: {action}", flush=True)
            record = self.state.get(stage.name)
            if action in RUNS:
                digest = stage.digest(self._datasets[stage.name], parent)
                self.state.drop_from([later.name for later, _ in plan[number - 1 :]])
                begun = self.state.begun(stage.name, digest) if action == "resume" else None
                self.state.underway = None
                record = self._run(stage, digest, before, begun)
                self.state.stages.append(record)
                self.state.underway = None
                self._write()
            parent, before = (record.digest, record) if record is not None else ("", None)
        self._check_modalities(self.curriculum.stages[-1])
        self._write()
        return self.state

    def _run(
        self, stage: Stage, digest: str, before: StageRecord | None, begun: Path | None
    ) -> StageRecord:
        """The stage, from its start or from the last checkpoint of the run ``begun``."""
        started = time.monotonic()
        config = stage.config
        model = stage.start or (Path(before.checkpoint) if before is not None else None)
        if model is not None:
            config = config.model_copy(
                update={"model": config.model.model_copy(update={"path": str(model)})}
            )
        if stage.is_sft:
            with _screen(stage, 1) as screen:
                made: PolicyResult = evaluate(config, screen)
            after = made.evaluations[-1] if made.evaluations else None
            return StageRecord.of(
                stage, digest, made.run, made.model, None, after, seconds=time.monotonic() - started
            )
        carried = (
            self._carry(stage, before, begun) if stage.keeps_replay and before is not None else None
        )
        if carried is not None:
            config = config.model_copy(
                update={"loop": config.loop.model_copy(update={"replay_from": carried})}
            )
        with _screen(stage, config.loop.steps) as screen:
            resumption = None
            if begun is not None:
                resumption = resumable(begun, config, screen.event)
                screen.event(str(resumption))

            def note(run_id: str) -> None:
                folder = config.output.folder / run_id
                self.state.underway = Underway(
                    name=stage.name, digest=digest, run=str(folder.resolve())
                )
                self._write()

            result = run_to_end(config, screen, resumption, note)
        if carried is not None:
            shutil.move(carried, result.run / carried.name)
        return StageRecord.of(
            stage,
            digest,
            result.run,
            (result.run / "checkpoint").resolve(),
            result.before,
            result.after,
            completions=result.completions,
            seconds=time.monotonic() - started,
        )

    def _carry(self, stage: Stage, before: StageRecord, begun: Path | None) -> Path | None:
        """Trajectories of the stage before, as this one replays them; None where that was
        supervised. A stage that has ``begun`` has them already."""
        if before.kind == "sft":
            return None
        datasets = self._datasets[stage.name]
        known = {
            prompt_id
            for file in datasets.asked
            for prompt_id in read_prompts(file, stage.config).ids
        }
        out = self.curriculum.folder / f"replay-into-{stage.name}.jsonl"
        config = stage.config
        if begun is None or not out.is_file():
            carry_over(
                Path(before.run),
                out,
                prompt_ids=known,
                weights=config.rewards.weights,
                login=config.buffer,
            )
        return out.resolve()

    def _check_modalities(self, last: Stage) -> None:
        """What the last policy can do without sound and without pictures; measured once per
        result."""
        record = self.state.get(last.name)
        if not self.curriculum.modality_check or self.state.modalities or record is None:
            return
        if self._datasets[last.name].heldout is None:
            return
        config = last.config.model_copy(update={"name": "modality-check", "cold_start": None})
        with _screen(last, 1) as screen:
            found = evaluate(config, screen, model=Path(record.checkpoint), without=MODALITY_CHECK)
        self.state.modalities = {
            "+".join(kinds): Result.of(evaluation)
            for kinds, evaluation in zip(MODALITY_CHECK, found.evaluations, strict=True)
        }

    def _write(self) -> None:
        folder = self.curriculum.folder
        replace_text(folder / STATE, self.state.model_dump_json(indent=1) + "\n")
        write_stage_report(folder, self.curriculum, self.state)


def _screen(stage: Stage, steps: int) -> Screen:
    config = stage.config
    return open_screen(config.screen, steps, title=stage.name, times=times_of(config))
