"""A recipe's run through all its lives: begun or gone on with, and taken back to its checkpoint
when state is lost."""

from __future__ import annotations

from collections.abc import Callable

from avatar_rl.cluster.checkpoints.resume import Resumption, prepare
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.services.restart_budget import RestartBudget
from avatar_rl.cluster.services.shared_storage import placed
from avatar_rl.cluster.telemetry.live_view import open_screen
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.run import Run, RunResult
from avatar_rl.cluster.workers.learner_group import StateLostError
from avatar_rl.common.process import compact_heap


def train(config: RunConfig, resume: str | None = None) -> RunResult:
    """Run a recipe, or go on with the run ``resume`` ("auto", an id or a folder).

    Raises AvatarError children for everything a user can cure, and Stopped when it was asked to
    stop and saved itself."""
    with open_screen(config.screen, config.loop.steps, title=config.name) as screen:
        config = placed(config)
        resumption = prepare(config, resume, screen.event) if resume is not None else None
        return run_to_end(config, screen, resumption)


def run_to_end(
    config: RunConfig,
    screen: Screen,
    resumption: Resumption | None = None,
    on_begin: Callable[[str], None] = lambda run_id: None,
) -> RunResult:
    """One run, told to ``on_begin`` by its id before it starts. When its learner's state is lost,
    it goes back to its last checkpoint by itself, as if it were resumed."""
    compact_heap()
    budget = RestartBudget(config.supervision.restarts, "learner states")
    while True:
        run = Run(config, screen, resumption)
        on_begin(run.run_id)
        try:
            return run.execute()
        except StateLostError as error:
            if config.checkpoint.every == 0:
                raise
            screen.event(f"{error}; the run goes back to its last checkpoint")
            before = resumption.step if resumption is not None else 0
            resumption = prepare(config, str(run.folder.path), screen.event)
            if resumption is not None and resumption.step > before:
                budget.progress()
            budget.spend(str(error))
