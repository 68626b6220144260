"""The training loop. Read ``train`` first: it is the whole run, from top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluation import EvaluationRounds
from avatar_rl.cluster.training.learning_watch import LearningWatch
from avatar_rl.cluster.training.parity import check_adopted
from avatar_rl.cluster.training.prompt_schedule import PromptSchedule
from avatar_rl.cluster.training.public_sets import PublicSetRounds
from avatar_rl.cluster.training.run_metrics import RunMetrics
from avatar_rl.cluster.training.supervisor import Supervisor
from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet
from avatar_rl.cluster.workers.turns import Turns
from avatar_rl.common.errors import ReplayBufferError

if TYPE_CHECKING:
    from avatar_rl.learner.step import StepReport

#: Between two looks whether all requests of a turn are answered.
TURN_LOOK_S = 0.01


@dataclass(frozen=True)
class TrainingRun:
    """What the loop works with; ``run.py`` builds it, and everything in it is up."""

    config: RunConfig
    first_step: int  # steps that are done already; above 0 for a resumed run
    schedule: PromptSchedule  # which prompts each step asks
    buffer: ReplayBuffer  # where rollout actors and learner meet
    fleet: RolloutFleet  # rollout actors: generate completions, have them scored, insert them
    learner: LearnerGroup  # learner ranks: train a step, publish the new weights
    turns: Turns  # of fleet and learner, where they share devices
    heldout: EvaluationRounds
    train_pool: EvaluationRounds  # of the training prompts
    public_sets: PublicSetRounds
    supervisor: Supervisor  # looks after all processes, takes the checkpoints
    metrics: RunMetrics
    tolerance: float | None  # of log-probabilities between engine and learner; None: any
    learning: LearningWatch  # ends a run that trains on nothing
    folder: RunFolder
    screen: Screen


def train(run: TrainingRun) -> None:
    """Train to ``loop.steps`` or to a target accuracy, with an evaluation before and after.

    Generation and training overlap: rollout actors answer whatever is requested, while the learner
    trains the step whose groups are complete. ``loop.max_staleness`` bounds how far they are apart.
    Where they share devices they alternate (``Turns``).

    Raises:
        Stopped: a signal asked for it; the supervisor can save a last checkpoint.
        NothingLearntError: no step had anything to learn from.
        AvatarError: what ends a run, such as too many deaths (workers/supervision.py).
    """
    steps = run.config.loop.steps
    step = requested = run.first_step  # steps trained, steps whose prompts are requested
    run.fleet.work()
    run.supervisor.signals.orderly = True
    evaluate_before(run)
    done = was_target_reached_before(run)
    while step < steps and not done:
        started = time.perf_counter()
        requested = generate(run, step, requested)
        report = train_step(run, step)  # the ranks publish the new version themselves
        step += 1
        log(run, step, report, time.perf_counter() - started)
        done = evaluate(run, step)
        run.turns.learner(run.supervisor.look)  # its state may be copied
        run.supervisor.checkpoint(step, last=done)  # where one is due; or stop, if asked to
    if run.first_step == 0:
        run.learning.end()
    run.turns.rollouts(run.supervisor.look)
    run.heldout.evaluate(step, "evaluation after training", run.supervisor.watch)
    run.public_sets.evaluate(step, "public sets after training", run.supervisor.watch)
    run.turns.learner(run.supervisor.look)  # for the export
    run.supervisor.checkpoints.wait()
    run.supervisor.signals.orderly = False


def generate(run: TrainingRun, step: int, requested: int) -> int:
    """Request the prompts of ``step`` and of the ``max_staleness`` steps after it, as far as that
    was not done. Returns the steps whose prompts are requested now; where devices are shared once
    all of them are answered."""
    loop = run.config.loop
    run.turns.rollouts(run.supervisor.look)
    ahead = min(step + loop.max_staleness + 1, loop.steps)
    for number in range(requested, ahead):
        averages = (
            run.buffer.replay.averages(run.schedule.prompt_ids) if loop.schedule == "open" else {}
        )
        run.buffer.requests.push(run.schedule.requests(number, averages))
    if run.turns.alternate:
        await_answers(run, step)
    return max(requested, ahead)


def await_answers(run: TrainingRun, step: int) -> None:
    """Until every request is settled, those of an evaluation too: then no engine has work left.

    Raises ReplayBufferError past ``loop.step_timeout_s``.
    """
    allowed = run.config.loop.step_timeout_s
    deadline = time.monotonic() + allowed
    while missing := run.buffer.requests.unsettled():
        run.fleet.watch(TURN_LOOK_S)
        run.supervisor.look()
        if time.monotonic() > deadline:
            raise ReplayBufferError(
                f"step {step}: {missing} requests were not answered within {allowed:g} s: see "
                "whether rollout and reward actors live, raise loop.step_timeout_s"
            )


def train_step(run: TrainingRun, step: int) -> StepReport:
    """One optimiser step on all ranks."""
    output = run.config.output
    wanted = output.samples_every and step % output.samples_every == 0
    run.turns.learner(run.supervisor.look)
    return run.learner.train(step, output.samples if wanted else 0, run.fleet, run.supervisor.look)


def log(run: TrainingRun, step: int, report: StepReport, seconds: float) -> None:
    """Metrics of a finished step, which took ``seconds`` of wall time with all waiting, to run
    folder and screen; the fleet's size follows them.

    Raises NothingLearntError where they show a run that cannot learn, and ModelError where rollouts
    do not sample from what is trained.
    """
    metrics = run.metrics.measure(step, report, seconds) | run.turns.metrics()
    run.fleet.autoscale(metrics)
    run.metrics.write(step, metrics, report)
    if run.tolerance is not None:
        check_adopted(metrics, run.tolerance)
    if run.metrics.stats is not None:
        run.learning.look(metrics, run.metrics.stats)


def evaluate(run: TrainingRun, step: int) -> bool:
    """Begin an evaluation where one is due, take in one that is complete; True once a target is
    met."""
    every, target = run.config.evaluation.every, run.config.loop.target_accuracy
    if every and step % every == 0 and step < run.config.loop.steps:
        run.heldout.begin(step)
    run.heldout.collect()
    measure_public_sets(run, step)
    if measure_pool(run, step):
        return True
    if run.heldout.reached(target):
        run.folder.event("target reached", f"{target} held-out at step {step}")
        return True
    return False


def evaluate_before(run: TrainingRun) -> None:
    """Held-out accuracy before training, unless a resumed run has it already."""
    if not run.heldout.results:
        run.turns.rollouts(run.supervisor.look)
        run.heldout.evaluate(0, "evaluation before training", run.supervisor.watch)
    if run.public_sets.prompt_ids and not run.public_sets.results:
        run.turns.rollouts(run.supervisor.look)
        run.public_sets.evaluate(0, "public sets before training", run.supervisor.watch)
    run.screen.phase("training")
    run.folder.status(state="training")
    if run.first_step == 0:
        measure_pool(run, 0)


def measure_public_sets(run: TrainingRun, step: int) -> None:
    """Ask the public sets when they are due; training waits."""
    every = run.config.evaluation.benchmarks.every
    if every and step % every == 0 and step < run.config.loop.steps:
        run.turns.rollouts(run.supervisor.look)
        run.public_sets.evaluate(step, "public sets", run.supervisor.watch)


def measure_pool(run: TrainingRun, step: int) -> bool:
    """Measure the accuracy over the training prompts when it is due; True once it is what the run
    stops at."""
    pool = run.config.evaluation.pool
    if not pool.every or step % pool.every:
        return False
    run.turns.rollouts(run.supervisor.look)
    run.train_pool.evaluate(step, "measuring the training prompts", run.supervisor.watch)
    accuracy = run.train_pool.results[-1].accuracy
    if pool.stop_at is None or accuracy < pool.stop_at:
        return False
    run.folder.event(
        "pool accuracy reached", f"{accuracy:.3f} at step {step}, stop_at {pool.stop_at:g}"
    )
    return True


def was_target_reached_before(run: TrainingRun) -> bool:
    """Whether a resumed run had met its target when it stopped: only its end is left to do."""
    config = run.config
    reached = run.first_step > 0 and (
        run.heldout.reached(config.loop.target_accuracy)
        or run.train_pool.reached(config.evaluation.pool.stop_at)
    )
    if reached:
        run.supervisor.report(
            "target was met",
            f"by step {run.first_step}: the run only ends; raise the target to train further",
        )
    return reached
