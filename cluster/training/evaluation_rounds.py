"""Evaluation rounds: prompts asked of the rollout actors through the stream, held-out ones while
training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import EvaluationConfig
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluation import Evaluation, summarise
from avatar_rl.cluster.training.prompt_schedule import evaluation_requests
from avatar_rl.common.errors import ReplayBufferError

POOL_ROUNDS = 500_000  # above the numbers of held-out rounds


class EvaluationRounds:
    """One round at a time; ``results`` holds the finished ones, oldest first, without their
    samples."""

    def __init__(
        self,
        config: EvaluationConfig,
        buffer: ReplayBuffer,
        prompt_ids: Sequence[str],
        folder: RunFolder,
        screen: Screen,
        *,
        selected: Collection[str] = (),
        pool: bool = False,
    ) -> None:
        self.config, self.buffer, self.folder, self.screen = config, buffer, folder, screen
        self.prompt_ids = list(prompt_ids)
        self.selected = frozenset(selected)
        self.pool = pool  # of the training prompts: sampled, and measured only
        self.results: list[Evaluation] = []
        self._round = POOL_ROUNDS if pool else 0
        self._pending: tuple[int, int] | None = None  # under way: round, step

    def begin(self, step: int) -> None:
        """Ask every held-out prompt of a policy at least as new as now; training goes on
        meanwhile."""
        if not self.prompt_ids or self._pending is not None:
            return
        self._round += 1
        self._pending = (self._round, step)
        samples = self.config.pool.samples if self.pool else 1
        version = self.buffer.replay.version()
        requests = evaluation_requests(
            self.prompt_ids, round=self._round, min_version=version, samples=samples
        )
        self.buffer.requests.push(requests)

    def collect(self) -> bool:
        """Take in the round under way when all its answers are there; True when none is under way
        any more."""
        if self._pending is None:
            return True
        round, step = self._pending
        results = self.buffer.requests.eval_results(round)
        if not results.complete:
            self.screen.progress(len(self.prompt_ids) - results.missing, len(self.prompt_ids))
            return False
        evaluation = summarise(round, list(results.payloads.values()), selected=self.selected)
        self.buffer.requests.clear_eval(round)
        self._pending = None
        self.results.append(replace(evaluation, samples=[]))
        if self.pool:
            self.folder.metrics(step, evaluation.metrics("pool"))
            return True
        self.folder.metrics(step, evaluation.metrics())
        self.folder.samples(step, evaluation.samples, kind="eval")
        self.folder.status(
            accuracy_before=self.results[0].accuracy, accuracy_now=evaluation.accuracy
        )
        self.screen.update(evaluation.metrics())
        return True

    def state(self) -> dict[str, Any]:
        """JSON-ready, for a checkpoint; the answers themselves are in the buffer."""
        results = [asdict(result) for result in self.results]
        return {"round": self._round, "pending": self._pending, "results": results}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._round = state["round"]
        self._pending = (state["pending"][0], state["pending"][1]) if state["pending"] else None
        self.results = [Evaluation(**result) for result in state["results"]]

    def reached(self, target: float | None) -> bool:
        """Whether the last evaluation met a target accuracy on the selected types (all, where none
        are selected)."""
        if target is None or not self.results:
            return False
        last = self.results[-1]
        return (last.accuracy if last.selected is None else last.selected) >= target

    def whole(self, step: int, phase: str, watch: Callable[[], None]) -> None:
        """A round waited for; ``watch`` is called meanwhile. Raises ReplayBufferError past the
        deadline."""
        if not self.prompt_ids:
            return
        if not self.pool:
            self.screen.phase(phase, f"{len(self.prompt_ids)} held-out prompts, greedy")
        deadline = time.monotonic() + self.config.timeout_s
        for begin in (False, True):  # first the one that began during training
            if begin:
                self.begin(step)
            while not self.collect():
                watch()
                if time.monotonic() > deadline:
                    raise ReplayBufferError(
                        f"the evaluation at step {step} did not finish within "
                        f"{self.config.timeout_s:g} s: see if the "
                        "rollout actors live, lower evaluation.limit or raise evaluation.timeout_s"
                    )
