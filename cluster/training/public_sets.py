"""Public sets answered by rollout actors: all questions of a checkpoint, resumably
(`avatar evaluate --benchmark`), and the rounds of a run that is measured on them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.benchmarks.answers import AnswerStore
from avatar_rl.cluster.benchmarks.convert import (
    Wording,
    check_kinds,
    lacking,
    read_questions,
    senses_of,
    to_prompt,
    write_prompts,
)
from avatar_rl.cluster.benchmarks.marks import mark
from avatar_rl.cluster.benchmarks.metrics import interval_of
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question, value_of
from avatar_rl.cluster.benchmarks.result import (
    Asking,
    SetResult,
    SetToAsk,
    alike,
    finish,
)
from avatar_rl.cluster.benchmarks.sets import benchmark_set
from avatar_rl.cluster.config import EvaluationConfig, RunConfig
from avatar_rl.cluster.recipe.assets import Datasets
from avatar_rl.cluster.recipe.resources import needs_of
from avatar_rl.cluster.telemetry.run_folder import RunFolder, new_run_id
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluation import (
    PUBLIC_ROUNDS,
    Answer,
    Evaluation,
    EvaluationRounds,
)
from avatar_rl.cluster.training.prompt_schedule import evaluation_requests
from avatar_rl.cluster.training.system import System, recorded, running_system
from avatar_rl.common.errors import ConfigError, ReplayBufferError
from avatar_rl.common.files import json_line, replaced_file
from avatar_rl.common.types import JsonObject

#: Questions of one round. Two rounds are under way at a time, so that no engine waits for the last
#: answer of one.
ROUND = 256
POLL_S = 0.1


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
        # Answers are marked by the sets' own rules, so there is no reward actor.
        needs = replace(needs_of(config), learners=0, scorers=0)
        with contextlib.closing(folder), recorded(folder):
            with running_system(config, folder, screen, datasets, needs=needs) as system:
                asking = _ask(system, model, open_)
            folder.status(state="finished")
    return [finish(one, asking) for one in sets]


def _ask(system: System, model: Path, asked: Sequence[tuple[SetToAsk, Question]]) -> Asking:
    """Asks until every question is answered or refused."""
    config = system.config
    run_id = system.folder.path.name[-64:]
    owners = {f"{one.benchmark.name}/{q.id}": (one.store, q.id) for one, q in asked}
    with ReplayBuffer.connect(config.buffer, run_id, url=system.services.redis_url) as buffer:
        fleet = system.rollout_fleet(config, run_id, model, buffer)
        system.screen.phase("starting actors", f"{config.rollout.workers} vLLM")
        with contextlib.closing(fleet):
            fleet.start(config.rollout.workers)
            fleet.await_ready()
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


@dataclass(frozen=True)
class PublicQuestions:
    """The questions of the sets that a run is measured on, and the file its actors read them
    from."""

    sets: tuple[tuple[BenchmarkSet, tuple[Question, ...]], ...]
    path: Path

    @property
    def ids(self) -> list[str]:
        """Of the prompts, in the order of the sets."""
        return [f"{one.name}/{question.id}" for one, asked in self.sets for question in asked]


def public_questions(config: RunConfig, model: Path) -> PublicQuestions | None:
    """What `evaluation.benchmarks` asks; None where it names no set.

    Raises ConfigError for an unknown set, one whose senses ``model`` lacks, and a reader that would
    not read our rows; InputError for files that are not as published."""
    wanted, reader = config.evaluation.benchmarks, config.data.reader
    if not wanted.names:
        return None
    assert wanted.sets is not None
    if reader.format not in ("auto", "native") or reader.limit is not None:
        raise ConfigError(
            "evaluation.benchmarks needs data.reader.format auto and no data.reader.limit: the "
            "questions are read by the same reader as the prompts"
        )
    senses = senses_of(model)
    found = []
    for name in dict.fromkeys(wanted.names):
        one = benchmark_set(name)
        if lacks := lacking(one, senses):
            raise ConfigError(
                f"evaluation.benchmarks: {name} is about {' and '.join(one.senses)}, and {model} "
                f"takes no {' and no '.join(lacks)}: its score would say nothing; leave it out"
            )
        media = config.output.cache / "public-sets" / one.name
        questions, _ = read_questions(
            one, wanted.sets / one.name, media.resolve(), skip=wanted.skip_missing
        )
        check_kinds(one, questions, senses, model)
        found.append((one, tuple(evenly(questions, wanted.limit))))
    hears = "audio" in senses
    prompts = [
        to_prompt(one, question, wanted.wording, hears=hears)
        for one, asked in found
        for question in asked
    ]
    content = hashlib.sha256("".join(one.model_dump_json() for one in prompts).encode()).hexdigest()
    path = config.output.cache / "public-sets" / f"{content[:16]}.jsonl"
    write_prompts(path, iter(prompts))
    return PublicQuestions(tuple(found), path)


def evenly(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """``limit`` of them at equal distances: sets are sorted by task, so the first say little."""
    count = min(limit or len(questions), len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


class PublicSetRounds(EvaluationRounds):
    """Rounds over all public sets of a run. Nothing else is under way meanwhile at staleness 0, so
    what is trained stays the same."""

    asked = "questions of public sets, greedy"
    patient = True

    def __init__(
        self,
        config: EvaluationConfig,
        buffer: ReplayBuffer,
        public: PublicQuestions | None,
        folder: RunFolder,
        screen: Screen,
    ) -> None:
        super().__init__(config, buffer, public.ids if public is not None else [], folder, screen)
        self.public = public
        self._round = PUBLIC_ROUNDS

    def report(self, step: int, round: int, payloads: Mapping[int, bytes]) -> None:
        """Accuracy of each set and its 95 % interval as metrics, every answer into
        benchmarks/step_NNNNNN.jsonl of the run folder."""
        assert self.public is not None
        answers: dict[str, Answer] = {
            self.prompt_ids[place]: json.loads(payload) for place, payload in payloads.items()
        }
        metrics: dict[str, float] = {}
        by_set: dict[str, float] = {}
        file = self.folder.path / "benchmarks" / f"step_{step:06d}.jsonl"
        file.parent.mkdir(exist_ok=True)
        with replaced_file(file) as beside, beside.open("wb") as out:
            for one, asked in self.public.sets:
                marked = []
                for question in asked:
                    answer = answers.get(f"{one.name}/{question.id}")
                    if answer is None:
                        continue
                    rule = one.marked_by or mark
                    found = rule(question, answer["text"], tokens=answer["tokens"])
                    marked.append(found)
                    row: JsonObject = {
                        "set": one.name,
                        "id": question.id,
                        "answer": question.answer,
                        "given": found.given,
                        "score": found.score,
                        "text": answer["text"],
                    }
                    out.write(json_line(row))
                if not marked:
                    continue
                headline = one.means(marked)["accuracy"]
                by_set[one.name] = accuracy = value_of(headline)
                interval = interval_of(headline)
                metrics |= {
                    f"benchmark/accuracy/{one.name}": accuracy,
                    f"benchmark/low/{one.name}": interval.low,
                    f"benchmark/high/{one.name}": interval.high,
                }
        self._tell_refused(step, len(payloads))
        self.results.append(
            Evaluation(
                round=round,
                version=min((answer["version"] for answer in answers.values()), default=0),
                accuracy=fmean(by_set.values()) if by_set else 0.0,
                prompts=len(answers),
                tokens=sum(answer["tokens"] for answer in answers.values()),
                by_category=by_set,
            )
        )
        self.folder.metrics(step, metrics)
        said = ", ".join(f"{name} {value:.3f}" for name, value in by_set.items())
        self.screen.event(f"public sets at step {step}: {said or 'no question was answered'}")

    def _tell_refused(self, step: int, answered: int) -> None:
        if answered == len(self.prompt_ids):
            return
        refused = self.buffer.requests.quarantined()
        why = alike([reason for name, reason in refused.items() if name in set(self.prompt_ids)])
        said = ", ".join(f"{count} x {reason}" for reason, count in why.items())
        missing = len(self.prompt_ids) - answered
        self.folder.event("public sets", f"step {step}: {missing} questions not asked ({said})")
