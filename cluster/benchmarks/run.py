"""Public sets asked of a checkpoint by rollout actors, several sets in one go, resumably."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.benchmarks.answers import AnswerStore
from avatar_rl.cluster.benchmarks.convert import Wording, to_prompt, write_prompts
from avatar_rl.cluster.benchmarks.intervals import Interval, bootstrap
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Marked, Question
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets
from avatar_rl.cluster.recipe.resources import needs_of
from avatar_rl.cluster.telemetry.run_folder import RunFolder, new_run_id
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.prompt_schedule import evaluation_requests
from avatar_rl.cluster.training.system import System, recorded, running_system
from avatar_rl.common.errors import DataError, ReplayBufferError
from avatar_rl.common.text import shortened
from avatar_rl.common.types import JsonObject

#: Questions of one round. Two rounds are under way at a time, so that no engine waits for the last
#: answer of one.
ROUND = 256
POLL_S = 0.1


@dataclass(frozen=True)
class SetToAsk:
    """A set, its questions, and where its answers are kept."""

    benchmark: BenchmarkSet
    questions: Sequence[Question]
    left_out: int  # questions whose media are missing
    store: AnswerStore

    def open(self) -> list[Question]:
        """The questions without an answer yet."""
        return [q for q in self.questions if q.id not in self.store.texts]


@dataclass(frozen=True)
class Asking:
    """How the asking of all sets went."""

    refused: Mapping[str, str]  # prompt id -> why it could not be asked
    seconds: float  # from the first question to the last answer; engines were up


@dataclass(frozen=True)
class SetResult:
    """A set's figures; accuracies in [0, 1]."""

    name: str
    figures: dict[str, float]  # "accuracy" first
    interval: Interval  # 95 %, of the mean score
    answered: int
    not_asked: int  # refused (``reasons``), or without media
    reasons: dict[str, int]  # why questions were refused, and how many for each reason
    mean_tokens: float
    seconds: float  # that asking took, of all sets of this call together; 0 where nothing was open
    by_length: dict[str, float]  # accuracy by thirds of the completions' length

    def row(self) -> JsonObject:
        return {
            "name": self.name,
            "figures": dict(self.figures),
            "interval": [self.interval.low, self.interval.high],
            "answered": self.answered,
            "not_asked": self.not_asked,
            "reasons": dict(self.reasons),
            "mean_tokens": self.mean_tokens,
            "seconds": self.seconds,
            "by_length": dict(self.by_length),
        }


def ask_sets(
    config: RunConfig,
    model: Path,
    sets: Sequence[SetToAsk],
    screen: Screen,
    *,
    wording: Wording,
    hears: bool,
) -> list[SetResult]:
    """Answer what is not answered yet, mark all, and write each set's result.

    Raises AvatarError children as an evaluation does; what was answered until then is kept."""
    open_ = [(one, question) for one in sets for question in one.open()]
    asking = Asking({}, 0.0)  # nothing was open
    if open_:
        folder = RunFolder(config.output.folder / new_run_id(config.name), on_warning=screen.event)
        folder.config(config.model_dump(mode="json"))
        prompts = folder.path / "questions.jsonl"
        write_prompts(
            prompts,
            (to_prompt(one.benchmark, q, wording, hears=hears) for one, q in open_),
        )
        datasets = Datasets(train=prompts, heldout=None, sft=None)
        needs = replace(needs_of(config), learners=0)
        with contextlib.closing(folder), recorded(folder):
            with running_system(config, folder, screen, datasets, needs=needs) as system:
                asking = _ask(system, model, open_)
            folder.status(state="finished")
    return [_finish(one, asking) for one in sets]


def _ask(system: System, model: Path, asked: Sequence[tuple[SetToAsk, Question]]) -> Asking:
    """Asks until every question is answered or refused."""
    config, pool = system.config, system.pool
    run_id = system.folder.path.name[-64:]
    owners = {f"{one.benchmark.name}/{q.id}": (one.store, q.id) for one, q in asked}
    pool.start_scorers(system.datasets.asked)
    with ReplayBuffer.connect(config.buffer, run_id, url=system.services.redis_url) as buffer:
        fleet = system.rollout_fleet(config, run_id, model, buffer)
        system.screen.phase("starting actors", f"{config.rollout.workers} vLLM")
        with contextlib.closing(fleet):
            fleet.start(config.rollout.workers)
            fleet.await_ready()
            pool.wait_ready([scorer.check.remote() for scorer in pool.scorers], "reward actors")
            fleet.work()
            system.screen.phase("asking", f"{len(asked)} questions, greedy")
            rounds = _Rounds(buffer, list(owners), owners, config.evaluation.timeout_s)
            begin = time.perf_counter()
            rounds.run(fleet.watch, lambda done: system.screen.progress(done, len(asked)))
            return Asking(buffer.requests.quarantined(), time.perf_counter() - begin)


class _Rounds:
    """Two rounds of questions under way; every answer is kept as it arrives."""

    def __init__(
        self,
        buffer: ReplayBuffer,
        ids: Sequence[str],
        owners: dict[str, tuple[AnswerStore, str]],
        timeout_s: float,
    ) -> None:
        self.buffer, self.owners, self.timeout_s = buffer, owners, timeout_s
        self.waiting = deque(
            (number, list(ids[first : first + ROUND]))
            for number, first in enumerate(range(0, len(ids), ROUND), start=1)
        )
        self.under_way: deque[tuple[int, list[str]]] = deque()
        self.done = 0
        self.seen: set[tuple[int, int]] = set()

    def run(self, watch: Callable[[], None], progress: Callable[[int], None]) -> None:
        """Raises ReplayBufferError when no answer comes for ``timeout_s``."""
        heard = time.monotonic()
        while self.waiting or self.under_way:
            while self.waiting and len(self.under_way) < 2:
                self._push(*self.waiting.popleft())
            watch()
            if self._collect():
                heard = time.monotonic()
                progress(self.done)
            elif time.monotonic() - heard > self.timeout_s:
                raise ReplayBufferError(
                    f"no answer came for {self.timeout_s:g} s: see whether the rollout actors "
                    "live, or raise evaluation.timeout_s; what is answered is kept"
                )
            else:
                time.sleep(POLL_S)

    def _push(self, number: int, ids: list[str]) -> None:
        requests = evaluation_requests(ids, round=number, min_version=0)
        self.buffer.requests.push(requests)
        self.under_way.append((number, ids))

    def _collect(self) -> int:
        """Keeps what has arrived; returns how many answers were new, or 1 where a round ended."""
        new = 0
        for number, ids in list(self.under_way):
            results = self.buffer.requests.eval_results(number)
            for seq, payload in results.payloads.items():
                if (number, seq) in self.seen:
                    continue
                self.seen.add((number, seq))
                answer = json.loads(payload)
                store, question_id = self.owners[ids[seq]]
                store.add(question_id, answer["text"], answer["tokens"])
                new += 1
            if results.complete:
                self.buffer.requests.clear_eval(number)
                self.under_way.remove((number, ids))
                new += 1
        self.done = len(self.seen)
        return new


def _finish(one: SetToAsk, asking: Asking) -> SetResult:
    marked = one.store.marked(one.questions)
    prefix = f"{one.benchmark.name}/"
    reasons = alike([why for name, why in asking.refused.items() if name.startswith(prefix)])
    if not marked:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        raise DataError(
            f"{one.benchmark.name}: no question could be asked ({why or 'none arrived'}): set "
            "data.reader.frames and data.template.max_pixels so that its media fit, or correct the "
            "files"
        )
    result = SetResult(
        name=one.benchmark.name,
        figures=one.benchmark.metric(marked),
        interval=bootstrap([m.score for m in marked], clusters=[cluster_of(m) for m in marked]),
        answered=len(marked),
        not_asked=len(one.questions) - len(marked) + one.left_out,
        reasons=reasons,
        seconds=asking.seconds,
        mean_tokens=sum(m.tokens for m in marked) / len(marked),
        by_length=by_length(marked),
    )
    one.store.finish(marked, result.row())
    one.store.close()
    return result


def alike(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason was given; alike but for names and numbers is one, shown by its first
    example."""
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for reason in reasons:
        pattern = re.sub(r"'[^']*'|\d+", "N", reason)
        example = examples.setdefault(pattern, shortened(reason, 240))
        counts[example] = counts.get(example, 0) + 1
    return counts


def cluster_of(one: Marked) -> str:
    """Questions about the same file are not independent of each other."""
    return one.question.media[0].uri if one.question.media else one.question.id


def by_length(marked: Sequence[Marked]) -> dict[str, float]:
    """Accuracy by thirds of the completions' length: "12-80 tokens" -> accuracy. For the gain by
    length (AVATAR, arXiv 2508.03100, Figure 6)."""
    ordered = sorted(marked, key=lambda one: one.tokens)
    thirds = [ordered[len(ordered) * i // 3 : len(ordered) * (i + 1) // 3] for i in range(3)]
    return {
        f"{third[0].tokens}-{third[-1].tokens} tokens": sum(one.score for one in third) / len(third)
        for third in thirds
        if third
    }
