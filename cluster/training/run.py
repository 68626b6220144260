"""One run from recipe to report. The loop itself is in `Run`; everything it calls is named after
what it does."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.checkpoints.resume import Resumption, check_assets, data_digest, open_folder
from avatar_rl.cluster.checkpoints.runlock import RunLock
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    Datasets,
    check_fusion,
    check_hints,
    check_media,
    model_digest,
    prepare_base_model,
    prepare_datasets,
    read_prompts,
)
from avatar_rl.cluster.recipe.resources import needs_of
from avatar_rl.cluster.services.restart_budget import RestartBudget
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.services.signals import Stopped
from avatar_rl.cluster.telemetry.run_folder import RunFolder, new_run_id
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.telemetry.sinks import PrometheusSink
from avatar_rl.cluster.telemetry.upload import open_target, upload
from avatar_rl.cluster.training.coldstart import cold_start
from avatar_rl.cluster.training.evaluation import Evaluation
from avatar_rl.cluster.training.evaluation_rounds import EvaluationRounds
from avatar_rl.cluster.training.parity import DEFAULT_TOLERANCE, ask_both, check_parity
from avatar_rl.cluster.training.prompt_schedule import PromptSchedule
from avatar_rl.cluster.training.replay_import import first_seq, import_replay
from avatar_rl.cluster.training.supervisor import Supervisor
from avatar_rl.cluster.workers.learner_group import LearnerGroup
from avatar_rl.cluster.workers.pool import Pool, unwrap
from avatar_rl.cluster.workers.rollout_fleet import Fleet
from avatar_rl.cluster.workers.specs import learner_spec, rollout_spec
from avatar_rl.prompts.selection import matching, select
from avatar_rl.rewards.actor import check_judge

log = logging.getLogger(__name__)

MOVING = 8  # steps in accuracy/moving


@dataclass(frozen=True)
class RunResult:
    """What a finished run can say of itself."""

    run: Path
    before: Evaluation | None
    after: Evaluation | None
    completions: int
    seconds: float


class Run:
    """Owns one run's services, actors and folder. Use ``execute``."""

    def __init__(
        self, config: RunConfig, screen: Screen, resumption: Resumption | None = None
    ) -> None:
        self.config, self.screen, self.resumption = config, screen, resumption
        self.checkpoint = resumption.checkpoint if resumption is not None else None
        self.run_id = resumption.run.name if resumption is not None else new_run_id(config.name)
        self.folder: RunFolder
        self.services: Services
        self.pool: Pool
        self.buffer: ReplayBuffer
        self.prompt_schedule: PromptSchedule
        self.fleet: Fleet
        self.learner: LearnerGroup
        self.lock: RunLock
        self.supervisor: Supervisor
        self.rounds: EvaluationRounds
        self.pool_rounds: EvaluationRounds
        self.heldout: list[str] = []
        self.selected: list[str] = []  # held-out prompts of the types that are trained
        self.accuracies: deque[float] = deque(maxlen=MOVING)
        self._quarantined: set[str] = set()  # said so in the events
        self._last: dict[str, float] = {}
        self._rollout_totals = dict.fromkeys(("tokens", "busy_s", "wait_s"), 0.0)

    def execute(self) -> RunResult:
        """Set up, train, evaluate, export, report; whatever happens, everything started is
        stopped."""
        started = time.monotonic()
        config = self.config
        path = (
            self.resumption.run
            if self.resumption is not None
            else config.output.folder / self.run_id
        )
        self.lock = RunLock(path, on_warning=self.screen.event)
        output, sinks = config.output, []
        if output.prometheus_port is not None:
            sinks.append(
                PrometheusSink(self.run_id, output.prometheus_port, output.prometheus_host)
            )
        self.folder = open_folder(
            path, self.lock, self.resumption, config.loop.steps, self.screen.event, sinks=sinks
        )
        self.folder.config(config.model_dump(mode="json"))
        try:
            needs_of(config)
            if config.output.upload is not None:
                open_target(
                    config.output.upload
                )  # a wrong URL is said before the run, not after it
            datasets, base = self._prepare()
            with Services(config, self.folder.path) as self.services:
                try:
                    self._set_up(datasets, base)
                    self._train_and_evaluate()
                    self._finish()
                except Stopped:
                    if hasattr(self, "supervisor") and self.supervisor.signals.asked is not None:
                        self.supervisor.save_last(self.accuracies)
                    raise
                finally:
                    if hasattr(self, "fleet"):
                        self.fleet.stop()
                    if hasattr(self, "supervisor"):
                        self.supervisor.close()
                    self.services.save_logs(self.folder.path / "logs")
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self.folder.event(
                "interrupted" if interrupted else "failed", str(error) or type(error).__name__
            )
            self.folder.status(state="interrupted" if interrupted else "failed", error=str(error))
            raise
        finally:
            self._report()
            self.folder.close()
            self.lock.release()
        if config.output.upload is not None:
            self.screen.event(
                f"run folder copied to {upload(self.folder.path, config.output.upload)}"
            )
        evaluations = self.rounds.results
        first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        completions = int(self._last.get("completions/generated", 0))
        return RunResult(self.folder.path, first, last, completions, time.monotonic() - started)

    # -- setting up --------------------------------------------------------------------------------

    def _prepare(self) -> tuple[Datasets, Path]:
        """Dataset and base model, read and checked: what can be known to be wrong is said before a
        process starts."""
        config = self.config
        datasets = prepare_datasets(config, self.screen.phase)
        base = prepare_base_model(config, self.screen.phase)
        train = read_prompts(datasets.train, config)
        check_media(train)
        check_hints(train, config)
        if config.buffer.hints.enabled and not any(prompt.hint for prompt in train):
            self.screen.event(
                "no training prompt has a hint, so none comes on; `avatar hints generate` writes "
                "them"
            )
        check_fusion(train, config)
        check_judge(config.rewards)
        self.prompt_schedule = PromptSchedule(
            select(train, config.data.select),
            config.loop,
            seed=config.seed,
            warm_up=config.buffer.warm_up,
            full_reward=sum(config.rewards.weights.values()),
        )
        if datasets.heldout is not None:
            heldout = read_prompts(datasets.heldout, config)
            check_media(heldout)
            self.heldout = heldout.ids[: config.evaluation.limit]
            self.selected = matching(heldout, config.data.select)
        return datasets, base

    def _set_up(self, datasets: Datasets, base: Path) -> None:
        config = self.config
        url, resuming = self.services.redis_url, self.resumption is not None
        if (
            config.buffer.url is not None
        ):  # the folder's lock is enough for the Redis that lives in it
            self.lock.acquire_redis(config.buffer, url)
        self.buffer = ReplayBuffer.connect(
            config.buffer, self.run_id, url=url, reconfigure=resuming
        )
        if self.checkpoint is not None:
            self.buffer.restore(self.checkpoint.buffer)
        elif resuming:
            self.buffer.clear()
            self.buffer = ReplayBuffer.connect(config.buffer, self.run_id, url=url)
        self.supervisor = Supervisor(
            config, self.folder, self.lock, self.services, self.buffer, self.screen
        )
        self.pool = Pool(config, self.services)
        self.pool.start_weight_store()
        self.pool.start_state_replica(config.learner.ranks)
        self.rounds = EvaluationRounds(
            config.evaluation,
            self.buffer,
            self.heldout,
            self.folder,
            self.screen,
            selected=self.selected,
        )
        if config.loop.replay_from is not None and self.checkpoint is None:
            import_replay(self.buffer, config.loop, self.folder)
        self.prompt_schedule.first_seq = first_seq(self.buffer)
        pool = self.prompt_schedule.prompt_ids if config.evaluation.pool.every else []
        self.pool_rounds = EvaluationRounds(
            config.evaluation, self.buffer, pool, self.folder, self.screen, pool=True
        )
        model = base
        if config.cold_start is not None:
            model = cold_start(config, self.pool, base, datasets, self.screen)
        if self.checkpoint is not None:
            check_assets(self.checkpoint, model, datasets)
        self._start_actors(model, datasets)
        digests = (model_digest(model), data_digest(datasets))
        rounds = {"heldout": self.rounds, "pool": self.pool_rounds}
        self.supervisor.attach(self.pool, self.fleet, self.learner, rounds, digests)
        self._probe(self.prompt_schedule.prompt_ids)
        if self.checkpoint is not None:
            for name, state in self.checkpoint.evaluation.items():
                rounds[name].restore(state)
            self.accuracies.extend(self.checkpoint.accuracies)
            self.learner.restore(self.checkpoint.learner, self.checkpoint.version)

    def _start_actors(self, model: Path, datasets: Datasets) -> None:
        config, pool = self.config, self.pool
        self.screen.phase(
            "starting actors", f"{config.rollout.workers} vLLM, {config.learner.ranks} DeepSpeed"
        )
        pool.start_scorers(datasets.asked)
        url = self.services.redis_url
        spec = rollout_spec(config, self.run_id, model, datasets, url)
        self.fleet = Fleet(
            pool, spec, self.buffer, self.folder, self.screen, scaling=config.rollout
        )
        self.fleet.start(config.rollout.workers)
        learner = learner_spec(config, self.run_id, model, datasets, url)
        budget = RestartBudget(config.supervision.restarts, "learner ranks")
        self.learner = LearnerGroup(
            pool,
            learner,
            config.learner.ranks,
            self.buffer,
            self.folder.path / ".held",
            budget,
            self.supervisor.report,
            config.supervision.learner_stall_s,
        )
        setup = self.learner.start()
        self.fleet.await_ready()
        [first, *_] = self.learner.await_ready(setup)
        pool.wait_ready([scorer.check.remote() for scorer in pool.scorers], "reward actors")
        self._dtype = first["dtype"]
        self.folder.event(
            "actors started",
            f"{', '.join(pool.rollouts)} and {config.learner.ranks} learner rank(s)",
        )

    def _probe(self, prompt_ids: list[str]) -> None:
        import ray

        probe = self.config.probe
        if probe.prompts == 0:
            return
        self.screen.phase("parity probe", f"{probe.prompts} prompts on both sides")
        while True:
            try:
                asked, seen = ask_both(
                    self.pool, prompt_ids[: probe.prompts], self.config.rollout.sampling
                )
                break
            except ray.exceptions.RayTaskError as error:
                raise unwrap(error) from error
            except ray.exceptions.RayActorError:  # whoever died is replaced
                self.fleet.await_ready()
                self.learner.await_ready([rank.progress.remote() for rank in self.pool.ranks])
        parity = check_parity(
            asked, seen, tolerance=probe.tolerance or DEFAULT_TOLERANCE[self._dtype]
        )
        message = f"{parity.tokens} tokens agree within {parity.max_difference:.1e}"
        self.folder.event("parity probe", message)
        self.screen.event(f"parity probe: {message}")

    # -- the loop ----------------------------------------------------------------------------------

    def _train_and_evaluate(self) -> None:
        config = self.config
        self.fleet.work()
        self.supervisor.signals.orderly = True
        if not self.rounds.results:
            self.rounds.whole(
                step=0, phase="evaluation before training", watch=self.supervisor.watch
            )
        self.screen.phase("training")
        self.folder.status(state="training")
        first = pushed = self.checkpoint.step if self.checkpoint is not None else 0
        step = first - 1
        if first == 0:
            self._pool_is_learnt(0)
        learnt = first > 0 and self._has_learnt()  # then only the end of the run is left to do
        if learnt:
            self.supervisor.report(
                "target was met", f"by step {first}: the run only ends; raise the target to go on"
            )
        for step in range(first, first if learnt else config.loop.steps):
            while pushed < min(step + config.loop.max_staleness + 1, config.loop.steps):
                self.buffer.requests.push(self.prompt_schedule.requests(pushed, self._averages()))
                pushed += 1
            started = time.perf_counter()
            wanted = config.output.samples_every and step % config.output.samples_every == 0
            samples = config.output.samples if wanted else 0
            report = self.learner.train(step, samples, self.fleet, self.supervisor.look)
            self._log_step(step + 1, report, time.perf_counter() - started)
            if (
                config.evaluation.every
                and (step + 1) % config.evaluation.every == 0
                and step + 1 < config.loop.steps
            ):
                self.rounds.begin(step + 1)
            self.rounds.collect()
            learnt = self._pool_is_learnt(step + 1) or self._is_target_reached(step + 1)
            self.supervisor.between_steps(step + 1, self.accuracies, last=learnt)
            if learnt:
                break
        self.rounds.whole(
            step=step + 1, phase="evaluation after training", watch=self.supervisor.watch
        )
        self.supervisor.checkpoints.wait()
        self.supervisor.signals.orderly = False

    def _averages(self) -> dict[str, float]:
        return (
            self.buffer.replay.averages(self.prompt_schedule.prompt_ids)
            if self.config.loop.schedule == "open"
            else {}
        )

    def _pool_is_learnt(self, step: int) -> bool:
        """Measure the accuracy over the training prompts when it is due; True once it is what the
        run stops at."""
        pool = self.config.evaluation.pool
        if not pool.every or step % pool.every:
            return False
        self.pool_rounds.whole(step, "measuring the training prompts", self.supervisor.watch)
        accuracy = self.pool_rounds.results[-1].accuracy
        if pool.stop_at is None or accuracy < pool.stop_at:
            return False
        self.folder.event(
            "pool accuracy reached", f"{accuracy:.3f} at step {step}, stop_at {pool.stop_at:g}"
        )
        return True

    def _has_learnt(self) -> bool:
        """Whether what was measured last, before the run went on, is what it stops at."""
        config = self.config
        return self.rounds.reached(config.loop.target_accuracy) or self.pool_rounds.reached(
            config.evaluation.pool.stop_at
        )

    def _is_target_reached(self, step: int) -> bool:
        target = self.config.loop.target_accuracy
        if reached := self.rounds.reached(target):
            self.folder.event("target reached", f"{target} held-out at step {step}")
        return reached

    def _log_step(self, step: int, report: Mapping[str, Any], seconds: float) -> None:
        metrics = dict(report["metrics"])
        if math.isfinite(metrics.get("accuracy/train", math.nan)):
            self.accuracies.append(metrics["accuracy/train"])
        if self.accuracies:
            metrics["accuracy/moving"] = sum(self.accuracies) / len(self.accuracies)
        metrics |= (
            self._buffer_metrics()
            | self._rollout_metrics(seconds)
            | {"time/step": seconds, "step": float(step)}
        )
        self.fleet.autoscale(metrics)
        self._last = metrics
        self.folder.metrics(step, metrics)
        self.folder.distributions(step, report["distributions"])
        self.folder.status(step=step, reward=metrics.get("reward/mean"))
        self.screen.update(metrics)
        if report["samples"]:
            self.folder.samples(step, report["samples"])

    def _report_quarantine(self) -> None:
        new = {
            name: why
            for name, why in self.buffer.requests.quarantined().items()
            if name not in self._quarantined
        }
        self._quarantined |= new.keys()
        for name, why in new.items():
            self.folder.event("prompt quarantined", f"{name}: {why}")

    def _buffer_metrics(self) -> dict[str, float]:
        stats = self.buffer.stats.read()
        if stats.quarantined_prompts > len(self._quarantined):
            self._report_quarantine()
        ledger = stats.ledger
        return {
            **{f"tiers/{name}": float(count) for name, count in stats.tiers.items()},
            "buffer/stored": float(stats.stock),
            "hints/active": float(stats.hints_on),
            "quarantined/prompts": float(stats.quarantined_prompts),
            "completions/generated": float(ledger.completions),
            "tokens/generated": float(ledger.tokens),
            "ledger/generated": float(ledger.generated),
            "ledger/trained_fresh": float(ledger.trained_fresh),
            "ledger/replay_only": float(ledger.replay_only),
            "ledger/dropped": float(sum(ledger.dropped.values())),
            "ledger/in_flight": float(ledger.in_flight),
        }

    def _rollout_metrics(self, seconds: float) -> dict[str, float]:
        """Rates since the last step, from the actors' own running totals."""
        facts = [self.buffer.control.get_value(f"rollout/{name}") for name in self.pool.rollouts]
        known = [fact for fact in facts if fact]
        before = self._rollout_totals
        totals = {name: float(sum(fact[name] for fact in known)) for name in before}
        self._rollout_totals = totals
        gained = {name: max(0.0, totals[name] - before[name]) for name in totals}
        busy = gained["busy_s"] + gained["wait_s"]
        if busy <= 0:
            return {}
        return {
            "rollout/tokens_per_s": gained["tokens"] / busy * max(1, len(known)),
            "time/rollout_wait": gained["wait_s"] / busy * seconds,
            "rollout/workers": float(len(self.fleet.working)),
        }

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self.config.output.export:
            self.screen.phase("exporting", "Hugging Face checkpoint")
            path = self.folder.path / "checkpoint"
            self.learner.export(path)
            self.folder.event("exported", str(path))
        books = self.buffer.stats.check_ledger()
        self.folder.event(
            "ledger closed", f"{books.generated} groups generated, {books.completions} completions"
        )
        self.folder.status(state="finished")

    def _report(self) -> None:
        if not self.config.output.report:
            return
        from avatar_rl.cluster.telemetry.report import write_report

        try:
            write_report(self.folder.path)
        except Exception as error:  # a report must never hide how the run ended
            log.warning("no report for %s: %s", self.folder.path, error, exc_info=True)
