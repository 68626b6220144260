"""Held-out accuracy: rounds of prompts that the rollout actors answer while training continues."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TypedDict

import msgspec

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.checkpoints.checkpoint import RoundsState
from avatar_rl.cluster.config import EvaluationConfig
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.prompt_schedule import evaluation_requests
from avatar_rl.common.errors import ReplayBufferError

POOL_ROUNDS = 500_000  # above the numbers of held-out rounds
PUBLIC_ROUNDS = 750_000  # above those of the training prompts


class Answer(TypedDict):
    """What a rollout actor writes for one prompt, among other things."""

    prompt_id: str
    category: str
    needs: list[str]
    accuracy: float | None  # None: masked
    version: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Evaluation:
    """One finished round. Accuracies are means over prompts, in [0, 1]."""

    round: int
    version: int  # oldest policy version among the answers
    accuracy: float
    prompts: int
    tokens: int
    by_category: dict[str, float] = field(default_factory=dict)
    by_need: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # prompts of each category
    need_counts: dict[str, int] = field(default_factory=dict)
    selected: float | None = None  # on prompts of the types that are trained; None without any
    samples: list[Answer] = field(default_factory=list)

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Flat names for the telemetry; prefix "pool" is the training prompts'."""
        found = {f"{prefix}/accuracy": self.accuracy}
        if self.selected is not None:
            found[f"{prefix}/selected"] = self.selected
        found |= {f"{prefix}/accuracy/{name}": value for name, value in self.by_category.items()}
        if prefix == "eval":
            found |= {f"{prefix}/needs/{name}": value for name, value in self.by_need.items()}
            found["eval/prompts"] = float(self.prompts)
            found |= {f"eval/prompts/{name}": float(n) for name, n in self.counts.items()}
            found |= {
                f"eval/prompts_needing/{name}": float(n) for name, n in self.need_counts.items()
            }
        return found


def summarise(
    round: int, payloads: Sequence[bytes], *, selected: Collection[str] = (), samples: int = 24
) -> Evaluation:
    """Average the answers written by the rollout actors; those with a masked accuracy are left out.

    ``selected`` are the ids of the held-out prompts of the types that are trained.
    """
    answers: list[Answer] = [json.loads(payload) for payload in payloads]
    answers.sort(key=lambda answer: answer["prompt_id"])
    by_category: dict[str, list[float]] = defaultdict(list)
    by_need: dict[str, list[float]] = defaultdict(list)
    accuracies = []
    trained = []
    for answer in answers:
        if answer["accuracy"] is None:
            continue
        accuracies.append(answer["accuracy"])
        if answer["prompt_id"] in selected:
            trained.append(answer["accuracy"])
        by_category[answer["category"] or "all"].append(answer["accuracy"])
        by_need["+".join(sorted(answer["needs"])) or "none"].append(answer["accuracy"])
    return Evaluation(
        round=round,
        version=min((answer["version"] for answer in answers), default=0),
        accuracy=fmean(accuracies) if accuracies else 0.0,
        prompts=len(accuracies),
        tokens=sum(answer["tokens"] for answer in answers),
        by_category={name: fmean(values) for name, values in sorted(by_category.items())},
        by_need={name: fmean(values) for name, values in sorted(by_need.items())},
        counts={name: len(values) for name, values in sorted(by_category.items())},
        need_counts={name: len(values) for name, values in sorted(by_need.items())},
        selected=fmean(trained) if trained else None,
        samples=answers[:: max(1, len(answers) // samples)][:samples],
    )


class EvaluationRounds:
    """Asks a set of prompts of the rollout actors, one round at a time.

    ``results`` holds the finished rounds, oldest first, without their samples.
    """

    asked = "held-out prompts, greedy"  # what the screen calls them
    patient = False  # the deadline is for an answer, not for a round

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
        self._missing = 0  # answers of the round under way

    def begin(self, step: int) -> None:
        """Ask every prompt, of a policy at least as new as now; training continues meanwhile."""
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
        """Report the round under way if all its answers are there. False while some are missing."""
        if self._pending is None:
            return True
        round, step = self._pending
        results = self.buffer.requests.eval_results(round)
        self._missing = results.missing
        if not results.complete:
            self.screen.progress(len(self.prompt_ids) - results.missing, len(self.prompt_ids))
            return False
        self.buffer.requests.clear_eval(round)
        self._pending = None
        self.report(step, round, results.payloads)
        return True

    def report(self, step: int, round: int, payloads: Mapping[int, bytes]) -> None:
        """A finished round to metrics, samples and screen. ``payloads`` are by place among
        ``prompt_ids``."""
        evaluation = summarise(round, list(payloads.values()), selected=self.selected)
        self.results.append(replace(evaluation, samples=[]))
        if self.pool:
            self.folder.metrics(step, evaluation.metrics("pool"))
            return
        self.folder.metrics(step, evaluation.metrics())
        self.folder.samples(step, evaluation.samples, kind="eval")
        self.folder.status(
            accuracy_before=self.results[0].accuracy, accuracy_now=evaluation.accuracy
        )
        self.screen.update(evaluation.metrics())

    def evaluate(self, step: int, phase: str, watch: Callable[[], None]) -> None:
        """A whole round, waited for; one under way is collected first.

        ``watch`` is called meanwhile. Raises ReplayBufferError past ``evaluation.timeout_s``.
        """
        if not self.prompt_ids:
            return
        if not self.pool:
            self.screen.phase(phase, f"{len(self.prompt_ids)} {self.asked}")
        deadline = time.monotonic() + self.config.timeout_s
        for begin in (False, True):
            if begin:
                self.begin(step)
            missing = self._missing
            while not self.collect():
                watch()
                if self.patient and self._missing != missing:
                    missing = self._missing
                    deadline = time.monotonic() + self.config.timeout_s
                if time.monotonic() > deadline:
                    raise ReplayBufferError(
                        f"the evaluation at step {step} did not finish within "
                        f"{self.config.timeout_s:g} s: see if the rollout actors live, lower "
                        "evaluation.limit or raise evaluation.timeout_s"
                    )

    def reached(self, target: float | None) -> bool:
        """Whether the last evaluation met ``target`` on the selected types, or on all where none
        are selected."""
        if target is None or not self.results:
            return False
        last = self.results[-1]
        return (last.accuracy if last.selected is None else last.selected) >= target

    def state(self) -> RoundsState:
        """For a checkpoint; the answers themselves are in the buffer."""
        return RoundsState(
            round=self._round,
            pending=list(self._pending) if self._pending is not None else None,
            results=[asdict(result) for result in self.results],
        )

    def restore(self, state: RoundsState) -> None:
        """Continue from ``state``."""
        pending = state["pending"]
        self._round = state["round"]
        self._pending = (pending[0], pending[1]) if pending else None
        self.results = [msgspec.convert(result, Evaluation) for result in state["results"]]
