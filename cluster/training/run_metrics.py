"""What the driver adds to a step's metrics: the buffer's state, rollout rates, moving averages."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

import psutil

from avatar_rl.buffer_service.stats import Stats
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.recipe.gpus import peak_flops
from avatar_rl.cluster.recipe.memory import MemoryPlan
from avatar_rl.cluster.telemetry.metrics import under_old_names
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.workers.judge_states import JudgeStates
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet

if TYPE_CHECKING:
    from avatar_rl.learner.step import StepReport

MOVING = 8  # steps in accuracy/moving
RATE_S = 5.0  # seconds over which rates are measured, at least
TOTALS = ("tokens", "busy_s", "wait_s")


class RunMetrics:
    """Metrics of every step of one run (names: telemetry/metrics.py)."""

    def __init__(
        self,
        buffer: ReplayBuffer,
        fleet: RolloutFleet,
        folder: RunFolder,
        screen: Screen,
        plan: MemoryPlan | None = None,
        judge: JudgeStates | None = None,
    ) -> None:
        """``plan`` of the recipe knows how many operations a step is; None: nobody does. ``judge``:
        where an endpoint is asked."""
        self.plan, self.judge = plan, judge
        self.buffer, self.fleet, self.folder, self.screen = buffer, fleet, folder, screen
        self.accuracies: deque[float] = deque(maxlen=MOVING)  # of the last steps
        self.last: dict[str, float] = {}
        self.stats: Stats | None = None  # of the buffer, at the last step
        self._quarantined: set[str] = set()  # already in the events
        #: Running totals of the rollout actors with their time, over the last seconds.
        self._totals: deque[tuple[float, dict[str, float]]] = deque(
            [(time.monotonic(), dict.fromkeys(TOTALS, 0.0))]
        )

    def measure(self, step: int, report: StepReport, seconds: float) -> dict[str, float]:
        """The metrics of ``step`` (counted from 1), from rank 0's report and the buffer."""
        metrics = dict(report["metrics"])
        if math.isfinite(metrics.get("accuracy/train", math.nan)):
            self.accuracies.append(metrics["accuracy/train"])
        if self.accuracies:
            metrics["accuracy/moving"] = sum(self.accuracies) / len(self.accuracies)
        self.stats = self.buffer.stats.checked()  # lost keys end the run here
        metrics |= self._buffer_metrics(self.stats) | self._rollout_metrics(seconds)
        if self.judge is not None:
            metrics |= self.judge.metrics()
        metrics |= {"time/step": seconds, "step": float(step)}
        metrics |= self._utilisation(metrics, report["device"])
        metrics["memory/host"] = psutil.virtual_memory().used / (1 << 30)
        metrics |= under_old_names(metrics)
        self.last = metrics
        return metrics

    def write(self, step: int, metrics: dict[str, float], report: StepReport) -> None:
        """To the run folder and the screen."""
        self.folder.metrics(step, metrics)
        self.folder.distributions(step, report["distributions"])
        self.folder.status(step=step, reward=metrics.get("reward/mean"))
        self.screen.update(metrics)
        if report["samples"]:
            self.folder.samples(step, report["samples"])

    def _utilisation(self, metrics: Mapping[str, float], device: str) -> dict[str, float]:
        """Operations that were needed, over those that the learner's GPUs could have done in the
        time of its passes and updates. Empty on a CPU, and for a GPU or model of unknown size."""
        peak = peak_flops(device)
        computed = [metrics.get(f"tokens/{name}", 0.0) for name in ("computed", "scored", "pairs")]
        seconds = metrics.get("time/forward_backward", 0.0) + metrics.get("time/optimizer", 0.0)
        if self.plan is None or peak is None or seconds <= 0 or not computed[0]:
            return {}
        ranks = self.plan.config.learner.ranks
        flops = self.plan.train_flops(*computed)
        return {"learner/mfu": flops / (seconds * ranks * peak)}

    def _buffer_metrics(self, stats: Stats) -> dict[str, float]:
        if stats.quarantined_prompts > len(self._quarantined):
            self._report_quarantined()
        ledger = stats.ledger
        return {
            **{f"tiers/{name}": float(count) for name, count in stats.tiers.items()},
            "buffer/stored": float(stats.stock),
            "hints/active": float(stats.hints_on),
            "hints/fired_kl": float(stats.counters.get("hints_fired_kl", 0)),
            "hints/fired_patience": float(stats.counters.get("hints_fired_patience", 0)),
            "quarantined/prompts": float(stats.quarantined_prompts),
            "completions/generated": float(ledger.completions),
            "tokens/generated": float(ledger.tokens),
            "prompts/seen": float(ledger.generated),
            "ledger/generated": float(ledger.generated),
            "ledger/trained_fresh": float(ledger.trained_fresh),
            "ledger/replay_only": float(ledger.replay_only),
            "ledger/dropped": float(sum(ledger.dropped.values())),
            **{f"dropped/{name}": float(count) for name, count in ledger.dropped.items()},
            "ledger/in_flight": float(ledger.in_flight),
        }

    def _report_quarantined(self) -> None:
        for name, why in self.buffer.requests.quarantined().items():
            if name not in self._quarantined:
                self._quarantined.add(name)
                self.folder.event("prompt quarantined", f"{name}: {why}")

    def _since(self, totals: dict[str, float]) -> dict[str, float]:
        """The totals of ``RATE_S`` ago, or of the step before where that is longer ago; ``totals``
        are those of now. Actors tell theirs once a second, so a short step alone may show none."""
        now = time.monotonic()
        while len(self._totals) > 1 and now - self._totals[1][0] >= RATE_S:
            self._totals.popleft()
        self._totals.append((now, totals))
        return self._totals[0][1]

    def _rollout_metrics(self, seconds: float) -> dict[str, float]:
        """Rates since the last step, from the actors' own running totals."""
        values = [
            self.buffer.control.get_value(f"rollout/{name}") for name in self.fleet.pool.rollouts
        ]
        known = [value for value in values if value]
        totals = {name: float(sum(value[name] for value in known)) for name in TOTALS}
        before = self._since(totals)
        gained = {name: max(0.0, totals[name] - before[name]) for name in totals}
        busy = gained["busy_s"] + gained["wait_s"]
        if busy <= 0:
            return {}
        return {
            "rollout/tokens_per_s": gained["tokens"] / busy * max(1, len(known)),
            "time/rollout_wait": gained["wait_s"] / busy * seconds,
            "rollout/workers": float(len(self.fleet.working)),
        }
