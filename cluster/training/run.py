"""One run of a recipe: set up, trained (loop.py), ended; everything that was started is stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rl.buffer_service.redis.connection import pauses_told
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.adapter_road import road_words
from avatar_rl.cluster.checkpoints.checkpoint import Checkpoint
from avatar_rl.cluster.checkpoints.resume import (
    Resumption,
    check_assets,
    data_digest,
    open_folder,
    with_begun_warmup,
)
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    Datasets,
    check_fusion,
    check_hints,
    check_lora,
    check_media,
    prepare_base_model,
    prepare_datasets,
    read_prompts,
)
from avatar_rl.cluster.recipe.content import model_digest
from avatar_rl.cluster.recipe.memory import MemoryPlan, leaves_device
from avatar_rl.cluster.recipe.resources import cluster_address, needs_of
from avatar_rl.cluster.services.signals import Stopped, StopSignals
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.telemetry.sinks import PrometheusSink, Sink
from avatar_rl.cluster.telemetry.trackers import Tracked, open_trackers
from avatar_rl.cluster.telemetry.upload import open_target, upload
from avatar_rl.cluster.training.evaluation import Evaluation, EvaluationRounds
from avatar_rl.cluster.training.learning_watch import LearningWatch
from avatar_rl.cluster.training.loop import TrainingRun, train
from avatar_rl.cluster.training.parity import parity_tolerance, probe_parity
from avatar_rl.cluster.training.prompt_schedule import PromptSchedule
from avatar_rl.cluster.training.public_sets import (
    PublicQuestions,
    PublicSetRounds,
    public_questions,
)
from avatar_rl.cluster.training.replay_import import first_seq, import_replay
from avatar_rl.cluster.training.run_metrics import RunMetrics
from avatar_rl.cluster.training.supervisor import Origin, Supervisor
from avatar_rl.cluster.training.system import System, recorded, running_system
from avatar_rl.cluster.workers.judge_states import JudgeStates
from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.pool import learner_spec
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet
from avatar_rl.cluster.workers.supervision import PauseReport, RedisWatch, RestartBudget
from avatar_rl.cluster.workers.turns import SharedDevice, Turns
from avatar_rl.cluster.workers.weight_road import check_transport, weight_transport
from avatar_rl.common.process import sees_gpu
from avatar_rl.prompts.selection import matching, select
from avatar_rl.rewards.actor import check_judge

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a finished run can say of itself."""

    run: Path
    before: Evaluation | None
    after: Evaluation | None
    completions: int
    seconds: float


@dataclass(frozen=True)
class Inputs:
    """What a run reads: datasets, the model to begin with, and the prompts it asks."""

    datasets: Datasets
    base: Path
    train: list[str]  # ids of the prompts that are trained
    heldout: list[str]
    selected: list[str]  # held-out prompts of the types that are trained
    public: PublicQuestions | None  # of the benchmarks that the run is measured on


def execute(
    config: RunConfig, screen: Screen, path: Path, resumption: Resumption | None = None
) -> RunResult:
    """Set up, train, evaluate, export, report. ``path`` is the run's folder.

    Raises AvatarError children for what a user can cure, and Stopped when it was asked to stop.
    """
    started = time.monotonic()
    config = with_begun_warmup(config, resumption)
    needs_of(config)
    if cluster_address(config) is None:
        check_transport(config, on_gpu=sees_gpu())
    if config.output.upload is not None:
        open_target(config.output.upload)  # a wrong URL is said before the run, not after it
    inputs = read_inputs(config, screen)  # before there is a folder: a bad row leaves none
    if resumption is not None and resumption.checkpoint is not None:
        check_assets(resumption.checkpoint, None, inputs.datasets)
    lock = RunLock(path, on_warning=screen.event)
    with (
        run_folder(config, path, lock, resumption, screen) as folder,
        running_system(config, folder, screen, inputs.datasets) as system,
        training_run(system, inputs, lock, resumption) as run,
    ):
        try:
            train(run)
            finish(run)
        except Stopped:
            if run.supervisor.signals.asked is not None:
                run.supervisor.save_last()
            raise
    if config.output.upload is not None:
        screen.event(f"run folder copied to {upload(path, config.output.upload)}")
    results = run.heldout.results
    before, after = (results[0], results[-1]) if results else (None, None)
    completions = int(run.metrics.last.get("completions/generated", 0))
    return RunResult(path, before, after, completions, time.monotonic() - started)


@contextmanager
def run_folder(
    config: RunConfig, path: Path, lock: RunLock, resumption: Resumption | None, screen: Screen
) -> Iterator[RunFolder]:
    """The locked run folder; at the end it says how the run ended, and holds the report."""
    output, sinks = config.output, list[Sink]()
    if output.prometheus_port is not None:
        sinks.append(PrometheusSink(path.name, output.prometheus_port, output.prometheus_host))
    folder = open_folder(
        path,
        lock,
        resumption,
        config.loop.steps,
        screen.event,
        sinks=sinks,
        samples_bytes=config.output.samples_mib << 20,
    )
    told = Tracked.of(config, path)
    names = output.metric_names
    folder.send_to(open_trackers(output.trackers, told, metric_names=names, tell=screen.event))
    folder.config(config.model_dump(mode="json"))
    screen.on_phase = folder.phase
    try:
        with recorded(folder):
            yield folder
    finally:
        if output.report:
            screen.phase("writing the report")
            _write_report(folder)
        folder.close()
        lock.release()


def read_inputs(config: RunConfig, screen: Screen) -> Inputs:
    """Datasets and base model, read and checked: what can be known to be wrong is said before a
    process starts, and before a tiny model is made."""
    datasets = prepare_datasets(config, screen.phase, screen.progress)
    prompts = read_prompts(datasets.train, config)
    check_media(prompts, config.data.media.roots)
    check_hints(prompts, config)
    if config.buffer.hints.enabled and not any(prompt.hint for prompt in prompts):
        screen.event(
            "no training prompt has a hint, so none comes on; `avatar hints generate` writes them"
        )
    check_fusion(prompts, config)
    check_judge(config.rewards)
    train_ids = select(prompts, config.data.select)
    heldout: list[str] = []
    selected: list[str] = []
    if datasets.heldout is not None:
        asked = read_prompts(datasets.heldout, config)
        check_media(asked, config.data.media.roots)
        heldout = asked.ids[: config.evaluation.limit]
        selected = matching(asked, config.data.select)
    if datasets.sft is not None and config.data.sft is not None:
        check_media(read_prompts(datasets.sft, config), config.data.media.roots)
    base = prepare_base_model(config, screen.phase)
    check_lora(config, base)
    public = public_questions(config, base)
    if public is not None:
        datasets = replace(datasets, public=public.path)
    return Inputs(datasets, base, train_ids, heldout, selected, public)


@contextmanager
def training_run(
    system: System, inputs: Inputs, lock: RunLock, resumption: Resumption | None
) -> Iterator[TrainingRun]:
    """Everything one run trains with, in the state of its checkpoint where there is one."""
    config, pool = system.config, system.pool
    checkpoint = resumption.checkpoint if resumption is not None else None
    with ExitStack() as stack:
        buffer = _connect(system, lock, resumption)
        redis = _watch_redis(system, stack)
        signals = stack.enter_context(StopSignals())
        stack.enter_context(pauses_told(PauseReport(system.report, signals)))
        replica = pool.start_state_replica(config.learner.ranks)
        heldout, train_pool, public_sets = _rounds(system, inputs, buffer)
        schedule = _schedule(system, inputs, buffer, is_new=checkpoint is None)
        model = system.starting_policy(inputs.base)
        if checkpoint is not None:
            check_assets(checkpoint, model, inputs.datasets)
        if road := road_words(config, model):
            system.report("lora", f"rollouts take {road}")
        system.screen.phase(
            "starting actors", f"{config.rollout.workers} vLLM, {config.learner.ranks} DeepSpeed"
        )
        pool.start_scorers(inputs.datasets.answered)
        fleet = system.rollout_fleet(config, lock.run_id, model, buffer)
        stack.callback(fleet.stop)
        learner = _learner(system, lock.run_id, model, replica, buffer)
        dtype = _start_actors(system, fleet, learner)
        turns = SharedDevice(fleet, learner) if config.resources.colocate else Turns()
        if config.weights.transport != "board":
            on_gpu = system.services.on_gpu
            road, why = weight_transport(config, model, on_gpu=on_gpu)
            system.report("weights", f"versions travel by {road}" + (f": {why}" if why else ""))
        plan = MemoryPlan.of(config)
        judge = JudgeStates(pool.scorers) if config.rewards.asks_judge else None
        metrics = RunMetrics(buffer, fleet, system.folder, system.screen, plan, judge)
        supervisor = Supervisor(
            config,
            folder=system.folder,
            screen=system.screen,
            lock=lock,
            signals=signals,
            redis=redis,
            buffer=buffer,
            fleet=fleet,
            learner=learner,
            rounds={"heldout": heldout, "pool": train_pool, "public": public_sets},
            accuracies=metrics.accuracies,
            origin=Origin(model_digest(model), data_digest(inputs.datasets)),
        )
        probe_parity(system, fleet, learner, inputs.train, dtype, turns)
        run = TrainingRun(
            config=config,
            first_step=checkpoint.step if checkpoint is not None else 0,
            schedule=schedule,
            buffer=buffer,
            fleet=fleet,
            learner=learner,
            turns=turns,
            heldout=heldout,
            train_pool=train_pool,
            public_sets=public_sets,
            supervisor=supervisor,
            metrics=metrics,
            tolerance=parity_tolerance(config, dtype),
            learning=LearningWatch(config, buffer, system.report),
            folder=system.folder,
            screen=system.screen,
        )
        if checkpoint is not None:
            _restore(run, checkpoint)
        yield run


def finish(run: TrainingRun) -> None:
    """Export the policy and close the ledger. Raises LedgerError when a group is unaccounted
    for."""
    if run.config.output.export:
        run.screen.phase("exporting", "Hugging Face checkpoint")
        path = run.folder.path / "checkpoint"
        run.learner.export(path)
        run.folder.event("exported", str(path))
    ledger = run.buffer.stats.check_ledger()
    run.folder.event(
        "ledger closed", f"{ledger.generated} groups generated, {ledger.completions} completions"
    )
    run.folder.status(state="finished")


# -- parts of the set-up ---------------------------------------------------------------------------


def _connect(system: System, lock: RunLock, resumption: Resumption | None) -> ReplayBuffer:
    """The run's buffer: new, restored from the checkpoint, or emptied where a resumed run has
    none."""
    config, url = system.config.buffer, system.services.redis_url
    if config.url is not None:  # the folder's lock is enough for the Redis that lives in it
        lock.acquire_redis(config, url)
    buffer = ReplayBuffer.connect(config, lock.run_id, url=url, reconfigure=resumption is not None)
    if resumption is None:
        return buffer
    if resumption.checkpoint is not None:
        buffer.restore(resumption.checkpoint.buffer)
        return buffer
    buffer.clear()
    return ReplayBuffer.connect(config, lock.run_id, url=url)


def _watch_redis(system: System, stack: ExitStack) -> RedisWatch | None:
    """A watch over the embedded server; None where Redis is somebody else's."""
    server = system.services.redis
    if server is None:
        return None
    budget = RestartBudget(system.config.supervision.restarts, "redis-server")
    pause_s = system.config.buffer.pause_s
    return stack.enter_context(RedisWatch(server, budget, system.report, pause_s))


def _rounds(
    system: System, inputs: Inputs, buffer: ReplayBuffer
) -> tuple[EvaluationRounds, EvaluationRounds, PublicSetRounds]:
    """Evaluation rounds of the held-out prompts, of the training prompts and of public sets."""
    config, folder, screen = system.config.evaluation, system.folder, system.screen
    heldout = EvaluationRounds(
        config, buffer, inputs.heldout, folder, screen, selected=inputs.selected
    )
    pool = EvaluationRounds(
        config, buffer, inputs.train if config.pool.every else [], folder, screen, pool=True
    )
    return heldout, pool, PublicSetRounds(config, buffer, inputs.public, folder, screen)


def _schedule(
    system: System, inputs: Inputs, buffer: ReplayBuffer, *, is_new: bool
) -> PromptSchedule:
    """Which prompts each step asks, numbered behind the replay that a new run begins with."""
    config = system.config
    if config.loop.replay_from is not None and is_new:
        import_replay(buffer, config.loop, system.folder)
    return PromptSchedule(
        inputs.train,
        config.loop,
        seed=config.seed,
        warm_up=config.buffer.warm_up,
        full_reward=config.rewards.full_reward,
        first_seq=first_seq(buffer),
    )


def _learner(
    system: System, run_id: str, model: Path, replica: ActorHandle, buffer: ReplayBuffer
) -> LearnerGroup:
    """The rank group, not started yet."""
    config = system.config
    return LearnerGroup(
        system.pool,
        learner_spec(
            config,
            run_id,
            model,
            system.datasets,
            system.services.redis_url,
            on_gpu=system.services.on_gpu,
            turn_lock=system.turn_lock,
            leaves_device=system.services.on_gpu and leaves_device(config),
        ),
        config.learner.ranks,
        replica,
        buffer,
        system.folder.path / ".held",
        RestartBudget(config.supervision.restarts, "learner ranks"),
        system.report,
        config.supervision.learner_stall_s,
    )


def _start_actors(system: System, fleet: RolloutFleet, learner: LearnerGroup) -> str:
    """Start all actors together and wait until they are ready; the data type the learner computes
    in. On shared devices the engines come first, and sleep while the learner loads."""
    config, pool = system.config, system.pool
    fleet.start(config.rollout.workers)
    if config.resources.colocate:
        fleet.await_ready()
        fleet.end_turn(lambda: None)
    setup = learner.start()
    if not config.resources.colocate:
        fleet.await_ready()
    [first, *_] = learner.await_ready(setup)
    for warning in first["warnings"]:
        system.report("model", warning)
    if first["why_pixels"]:
        system.folder.event("embedding store off", first["why_pixels"])
    if first["lora"]:
        system.report("lora", first["lora"])
    pool.wait_ready([scorer.check.remote() for scorer in pool.scorers], "reward actors")
    system.folder.event(
        "actors started",
        f"{', '.join(pool.rollouts)} and {config.learner.ranks} learner rank(s)",
    )
    return first["dtype"]


def _restore(run: TrainingRun, checkpoint: Checkpoint) -> None:
    for name, state in checkpoint.evaluation.items():
        run.supervisor.rounds[name].restore(state)
    run.metrics.accuracies.extend(checkpoint.accuracies)
    run.learner.restore(checkpoint.learner, checkpoint.version)


def _write_report(folder: RunFolder) -> None:
    from avatar_rl.cluster.telemetry.report import write_report

    try:
        write_report(folder.path)
    except Exception as error:  # a report must never hide how the run ended
        log.warning("no report for %s: %s", folder.path, error, exc_info=True)
