"""A run through all its restarts: begun or resumed, and taken back to its last checkpoint when the
learner's state is lost."""

from __future__ import annotations

from collections.abc import Callable

from avatar_rl.cluster.checkpoints.resume import Resumption, prepare
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.services.shared_storage import placed
from avatar_rl.cluster.telemetry.live_view import open_screen
from avatar_rl.cluster.telemetry.phase_times import times_of
from avatar_rl.cluster.telemetry.run_folder import new_run_id
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.run import RunResult, execute
from avatar_rl.cluster.workers.learner_group import StateLostError
from avatar_rl.cluster.workers.supervision import RestartBudget
from avatar_rl.common.process import compact_heap


def start_or_resume(config: RunConfig, resume: str | None = None) -> RunResult:
    """Run a recipe, or resume the run ``resume`` ("auto", an id or a folder).

    Raises AvatarError children for everything a user can cure, and Stopped when it was asked to
    stop and saved itself.
    """
    times = times_of(config)
    with open_screen(config.screen, config.loop.steps, title=config.name, times=times) as screen:
        config = placed(config)
        resumption = prepare(config, resume, screen.event) if resume is not None else None
        return run_to_end(config, screen, resumption)


def run_to_end(
    config: RunConfig,
    screen: Screen,
    resumption: Resumption | None = None,
    on_begin: Callable[[str], None] = lambda run_id: None,
) -> RunResult:
    """One run; ``on_begin`` hears its id before it starts.

    When its learner's state is lost it resumes by itself from its last checkpoint. Raises
    ResourceError when that happens too often without a newer checkpoint.
    """
    compact_heap()
    budget = RestartBudget(config.supervision.restarts, "learner states")
    while True:
        path = (
            resumption.run
            if resumption is not None
            else config.output.folder / new_run_id(config.name)
        )
        on_begin(path.name)
        screen.run(path)
        try:
            return execute(config, screen, path, resumption)
        except StateLostError as error:
            if config.checkpoint.every == 0:
                raise
            screen.event(f"{error}; the run goes back to its last checkpoint")
            before = resumption.step if resumption is not None else 0
            resumption = prepare(config, str(path), screen.event)
            if resumption is not None and resumption.step > before:
                budget.progress()
            budget.spend(str(error))
