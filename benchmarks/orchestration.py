"""What orchestration costs -> build/bench/orchestration.json; run with ``make bench
NAME=orchestration``, 8 minutes.

``rollout_efficiency``: tokens/s of the rollout path (lease, media, scoring, insert into Redis) over
tokens/s of its own engine on the same prompts, seeds and lengths, by turns in one process.
``media_workers_ratio``: prompts/s of prompts seen for the first time, with short completions, their
media prepared by a worker process, over those of an actor that prepares them itself.
``overlap_efficiency``: max(G, T) over the step time at staleness 1, G being the time to generate a
step's groups alone and T the time of a trainer that only sleeps. docs/benchmarks.md says how to
read them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import ray
from safetensors.torch import load_file

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest
from avatar_rl.actors.engine.prompt_cache import EngineInput, RenderedPrompt
from avatar_rl.actors.feeder import render
from avatar_rl.actors.groups import completions_of
from avatar_rl.actors.prompt_workers import PromptWorkers, PromptWorkerSpec
from avatar_rl.actors.rollout import RolloutActor
from avatar_rl.buffer_service.records.requests import InsertReceipt, RequestLease, RolloutRequest
from avatar_rl.buffer_service.requests import RequestQueue
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.block import pack_weights
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import prepare_base_model, prepare_datasets
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.workers.pool import Pool, rollout_spec
from avatar_rl.common.scoring import UnscoredGroup
from benchmarks.harness import Figures, parser, spread

RUN_ID = "bench"
SEQUENCES = 64  # in flight
POLL_S = 0.01
DEADLINE_S = 300.0

Figure = Iterator[tuple[str, float]]


class Spent(NamedTuple):
    """Seconds of one round: on the wall, and of the actor's process on any core."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Spent:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Spent) -> Spent:
        return Spent(self.wall - start.wall, self.cpu - start.cpu)


@dataclass(frozen=True)
class Sizes:
    """What is measured at which sizes."""

    pool: int = 32  # prompts; they recur
    shapes: tuple[tuple[int, int], ...] = ((64, 4), (64, 8), (24, 4), (24, 8))  # (tokens, n)
    waves: int = 8  # engine loads of 64 tokens in a round
    cold_rounds: int = 3
    media_tokens: int = 8  # of a completion, where media shall be most of the work
    trainers: tuple[tuple[str, float], ...] = (
        ("equal", 1.0),
        ("slow_trainer", 2.0),
        ("fast_trainer", 0.5),
    )


SMOKE = Sizes(8, ((24, 4),), 1, 1, trainers=(("equal", 1.0),))


class TimedRequests:
    """A rollout actor's side of the buffer, with a stopwatch. ``delivered`` is called after each
    insert."""

    def __init__(self, requests: RequestQueue, delivered: Callable[[], None]) -> None:
        self.requests, self.delivered = requests, delivered
        self.renew, self.release = requests.renew, requests.release
        self.clock: dict[str, list[float]] = defaultdict(list)  # seconds per call

    def lease(self, *arguments: Any, **options: Any) -> list[RequestLease]:
        start = time.perf_counter()
        leases = self.requests.lease(*arguments, **options)
        if leases:
            self.clock["lease"].append((time.perf_counter() - start) / len(leases))
        return leases

    def add_group(self, *arguments: Any, **options: Any) -> InsertReceipt:
        start = time.perf_counter()
        receipt = self.requests.add_group(*arguments, **options)
        self.clock["insert"].append(time.perf_counter() - start)
        self.delivered()
        return receipt


class MeasuredActor(RolloutActor):
    """The rollout actor with a stopwatch, and its engine without anything around it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.timed = TimedRequests(self.buffer.requests, self.note_delivery)
        self.buffer.requests = self.timed  # type: ignore[assignment]
        self.left = 0
        self.delivered = Spent.now()

    def note_delivery(self) -> None:
        self.left -= 1
        if self.left == 0:
            # ending takes as long as the wait for news of the weights
            self.delivered = Spent.now()
            self.stop()

    def set_length(self, tokens: int) -> None:
        """Every completion has this many tokens from now on."""
        sampling = self.spec.sampling.model_copy(update={"max_tokens": tokens, "ignore_eos": True})
        self.spec = replace(self.spec, sampling=sampling)

    def path(self, groups: int) -> Spent:
        """Time until ``groups`` requests, in the stream already, are groups that the buffer has
        acknowledged."""
        self.left = groups
        start = Spent.now()
        self.run()
        return self.delivered.since(start)

    def begin_workers(self, count: int) -> None:
        """Until the next ``path`` has ended, ``count`` processes prepare prompts; returns once one
        is up."""
        self.workers = None
        if count:
            spec = self.spec
            settings = PromptWorkerSpec(spec.model, spec.media, spec.template, self.engine.settings)
            self.workers = PromptWorkers(settings, count)
            self.workers.start()
            deadline = time.monotonic() + DEADLINE_S
            while not self.workers.up:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no media worker came up within {DEADLINE_S:g} s")
                time.sleep(POLL_S)

    def worker_s(self) -> float:
        """Seconds that the workers of the last ``path`` spent on prompts."""
        return 0.0 if self.workers is None else self.workers.busy_s

    def bare(self, requests: list[RolloutRequest]) -> Spent:
        """Time the engine alone needs for ``requests``: all queued at once, media preprocessed
        before."""
        work = [
            render(self.engine, self.encoder, self.prompts[request.prompt_id], hinted=False)
            for request in requests
        ]
        start = Spent.now()
        for request, entry in zip(requests, work, strict=True):
            self.submit(f"bare-{request.seq}", entry, request)
        finished = self.finish()
        spent = Spent.now().since(start)
        assert len(finished) == len(requests)
        return spent

    def cold(self, requests: list[RolloutRequest]) -> Spent:
        """Time as ``bare``, media decoded and preprocessed by the same thread whenever the engine
        has a free slot."""
        waiting = list(reversed(requests))
        start = Spent.now()
        while waiting or self.engine.in_flight:
            while waiting and (self.engine.in_flight + 1) * waiting[-1].n <= SEQUENCES:
                request = waiting.pop()
                entry = self.encoder.engine_input(self.prompts[request.prompt_id], hinted=False)
                self.submit(f"cold-{request.seq}", entry, request)
            self.engine.step()
        return Spent.now().since(start)

    def submit(
        self, request_id: str, entry: EngineInput | RenderedPrompt, request: RolloutRequest
    ) -> None:
        sampling = RequestSampling.of(self.spec.sampling, request.n)
        self.engine.submit(request_id, entry, sampling, seed=request.seq)

    def finish(self) -> list[FinishedRequest]:
        """Step until nothing is in flight."""
        finished = []
        while self.engine.in_flight:
            finished += self.engine.step()
        return finished

    def score_s(self, request: RolloutRequest, calls: int) -> float:
        """Median seconds of one scoring round trip, engine idle."""
        entry = self.encoder.engine_input(self.prompts[request.prompt_id], hinted=False)
        self.submit("score", entry, request)
        [finished] = self.finish()
        answers = completions_of(finished)
        group = UnscoredGroup(prompt_id=request.prompt_id, completions=answers)
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            ray.get(self.scorer.score.remote([group]))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def medians(self) -> dict[str, float]:
        """Median seconds per group of the timed calls so far; the clock starts anew."""
        found = {name: statistics.median(times) for name, times in self.timed.clock.items()}
        self.timed.clock.clear()
        return found


class Stage:
    """Services, one rollout actor and a learner-side client of the buffer, all on the real code
    path."""

    def __init__(self, folder: Path, cache: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        prompts = sizes.pool * (1 + 4 * sizes.cold_rounds)
        settings: dict[str, Any] = {
            "data": {
                "synthetic": {"n_train": prompts, "n_heldout": 8, "n_sft": 0},
                "template": {"min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 256},
            },
            "rollout": {
                "max_sequences": SEQUENCES,
                "engine": {
                    "max_model_len": 320,
                    "max_num_seqs": SEQUENCES,
                    # else a new version's prefill trickles in two sequences a step
                    "max_num_batched_tokens": 4096,
                    "kv_cache_memory_bytes": 64 << 20,
                },
                "sampling": {"max_tokens": 64, "ignore_eos": True},
            },
            "loop": {"max_staleness": 1},
            "output": {"cache": cache},
        }
        self.config = RunConfig.model_validate(settings)
        self.folder, self.exits = folder, ExitStack()
        self.numbers = count()

    def __enter__(self) -> Stage:
        with ExitStack() as exits:
            config = self.config
            self.services = exits.enter_context(Services(config, self.folder))
            datasets = prepare_datasets(config, lambda *_: None)
            model = prepare_base_model(config, lambda *_: None)
            url = self.services.redis_url
            self.buffer = exits.enter_context(ReplayBuffer.connect(config.buffer, RUN_ID, url=url))
            self.fencing_token = self.buffer.replay.new_fencing_token()
            self.pool = Pool(config, self.services)
            self.pool.start_scorers(datasets.asked)
            spec = rollout_spec(config, RUN_ID, model, datasets, url)
            make = self.pool.actor_class(MeasuredActor, cpus=1, max_concurrency=4)
            self.actor = make.remote(
                "rollout-0", spec, self.pool.scorers[0], self.pool.weight_store
            )
            self.pool.wait_ready([self.actor.ready.remote()], "rollout actor")
            self.weights = load_file(model / "model.safetensors")
            self.exits = exits.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.exits.close()

    def requests(self, groups: int, n: int, step: int = 0, first: int = 0) -> list[RolloutRequest]:
        """Requests over the pool of recurring prompts from prompt ``first`` on."""
        pool = self.sizes.pool
        chosen = [next(self.numbers) for _ in range(groups)]
        return [
            RolloutRequest(seq=seq, prompt_id=f"train-{first + place % pool:05d}", step=step, n=n)
            for place, seq in enumerate(chosen)
        ]

    def call(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self.actor, method).remote(*arguments))

    def path(self, requests: list[RolloutRequest]) -> Spent:
        self.buffer.requests.push(requests)
        return self.call("path", len(requests))


def efficiency(stage: Stage, rounds: int) -> Figure:
    """Path over bare engine, warm, for each length and group size."""
    pool, waves = stage.sizes.pool, stage.sizes.waves
    ratios: list[list[float]] = []
    for tokens, n in stage.sizes.shapes:
        stage.call("set_length", tokens)
        groups = waves * SEQUENCES // n * (64 // tokens)
        stage.call("bare", stage.requests(pool, n))  # warms the media
        stage.call("medians")
        spent: dict[str, list[Spent]] = {"bare": [], "path": []}
        for turn in range(rounds):
            for what in ("bare", "path") if turn % 2 == 0 else ("path", "bare"):
                requests = stage.requests(groups, n)
                spent[what].append(
                    stage.path(requests) if what == "path" else stage.call("bare", requests)
                )
        name = f"{tokens}x{n}"
        pairs = list(zip(spent["bare"], spent["path"], strict=True))
        ratios.append([bare.wall / path.wall for bare, path in pairs])
        yield f"rollout_efficiency_{name}", statistics.median(ratios[-1])
        yield f"rollout_efficiency_{name}_low", min(ratios[-1])
        yield f"rollout_efficiency_{name}_high", max(ratios[-1])
        yield (
            f"rollout_cpu_ratio_{name}",
            statistics.median(bare.cpu / path.cpu for bare, path in pairs),
        )
        for what, rows in spent.items():
            yield (
                f"{what}_tokens_per_s_{name}",
                groups * n * tokens / statistics.median(row.wall for row in rows),
            )
        for what, seconds in stage.call("medians").items():
            yield f"{what}_ms_{name}", 1e3 * seconds
        yield f"score_ms_{name}", 1e3 * stage.call("score_s", stage.requests(1, n)[0], 50)
    yield "rollout_efficiency", statistics.median(ratios[0])


def cold_pass(stage: Stage) -> Figure:
    """The same for prompts seen for the first time: their media are decoded and preprocessed."""
    pool, rounds = stage.sizes.pool, stage.sizes.cold_rounds
    stage.call("set_length", 64)
    pairs = []
    for turn in range(rounds):
        first = pool * (1 + 2 * turn)
        bare = stage.call("cold", stage.requests(pool, 4, first=first))
        path = stage.path(stage.requests(pool, 4, first=first + pool))
        pairs.append(bare.wall / path.wall)
    yield "rollout_efficiency_cold", statistics.median(pairs)


def worker_pass(stage: Stage) -> Figure:
    """New prompts with completions of ``media_tokens``: a worker process prepares them, or the
    actor does."""
    pool, rounds, n = stage.sizes.pool, stage.sizes.cold_rounds, 2
    stage.call("set_length", stage.sizes.media_tokens)
    begin = pool * (1 + 2 * rounds)
    spent: dict[int, list[Spent]] = {0: [], 1: []}
    share = []
    for turn in range(2 * rounds):
        count = (turn + turn // 2) % 2  # 0 1 1 0 0 1
        stage.call("begin_workers", count)
        spent[count].append(stage.path(stage.requests(pool, n, first=begin + turn * pool)))
        if count:
            share.append(stage.call("worker_s") / pool)
    stage.call("begin_workers", 0)
    pairs = list(zip(spent[0], spent[1], strict=True))
    yield from spread("media_workers_ratio", [own.wall / other.wall for own, other in pairs])
    # What the actor's own process computes: the rest of the machine hardly moves it.
    yield from spread("media_workers_cpu_ratio", [own.cpu / other.cpu for own, other in pairs])
    for count, rows in spent.items():
        name = "worker" if count else "actor"
        yield f"prompts_per_s_{name}", pool / statistics.median(row.wall for row in rows)
    yield "worker_ms_per_prompt", 1e3 * statistics.median(share)


class SimulatedTrainer:
    """Leases a step's groups, sleeps, publishes the same weights as the next version and
    commits."""

    def __init__(self, stage: Stage, groups: int, n: int) -> None:
        self.stage, self.groups, self.n = stage, groups, n
        self.step = self.pushed = 0
        self.work = stage.actor.run.remote()

    def push(self, step: int) -> None:
        while self.pushed <= step:
            self.stage.buffer.requests.push(
                self.stage.requests(self.groups, self.n, step=self.pushed)
            )
            self.pushed += 1

    def train(self, seconds: float) -> None:
        """One step that takes ``seconds`` from the moment its groups are in."""
        buffer, deadline = self.stage.buffer, time.monotonic() + DEADLINE_S
        while not (
            share := buffer.replay.lease_fresh(
                "trainer", self.step, fencing_token=self.stage.fencing_token
            )
        ).ready:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"step {self.step}: {share.missing} groups missing after {DEADLINE_S:g} s"
                )
            done, _ = ray.wait([self.work], timeout=POLL_S)
            if done:
                ray.get(done)
        start = time.monotonic()
        reference = ray.put(pack_weights(self.step + 1, self.stage.weights))
        time.sleep(max(0.0, seconds - (time.monotonic() - start)))
        ray.get(self.stage.pool.weight_store.publish.remote(reference))
        buffer.replay.commit_step(
            self.step,
            self.step + 1,
            [group.id for group in share.groups],
            self.stage.fencing_token,
        )
        self.step += 1

    def alone(self) -> float:
        """Seconds to generate one step's groups with nothing else under way, G."""
        self.push(self.step - 1)
        deadline = time.monotonic() + DEADLINE_S
        while (stats := ray.get(self.stage.actor.stats.remote()))["version"] < self.step:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"version {self.step} not adopted within {DEADLINE_S:g} s: {stats}"
                )
            time.sleep(POLL_S)
        start = time.perf_counter()
        self.push(self.step)
        self.train(0.0)
        return time.perf_counter() - start

    def overlapped(self, seconds: float, steps: int) -> float:
        """Seconds per step at staleness 1, as cluster/training/loop.py runs it; the first step
        fills the pipeline."""
        start = 0.0
        for number in range(steps + 1):
            self.push(self.step + 1)
            self.train(seconds)
            if number == 0:
                start = time.perf_counter()
        return (time.perf_counter() - start) / steps

    def drain(self) -> None:
        """Train what has been pushed."""
        while self.step < self.pushed:
            self.train(0.0)

    def stop(self) -> Mapping[str, Any]:
        ray.get(self.stage.actor.stop.remote())
        return ray.get(self.work)


def overlap(stage: Stage, steps: int, groups: int, n: int, tokens: int) -> Figure:
    """max(G, T) over the step time, for a trainer as slow, twice as slow and twice as fast as
    generation."""
    stage.call("set_length", tokens)
    trainer = SimulatedTrainer(stage, groups, n)
    trainer.alone()
    worst = []
    before = ray.get(stage.actor.stats.remote())
    for name, factor in stage.sizes.trainers:
        alone = [trainer.alone() for _ in range(2)]
        train_s = factor * statistics.mean(alone)
        step_s = trainer.overlapped(train_s, steps)
        trainer.drain()
        alone += [trainer.alone() for _ in range(2)]
        generate_s = statistics.mean(alone)
        worst.append(max(generate_s, train_s) / step_s)
        yield f"generate_s_{name}", generate_s
        yield f"generate_spread_{name}", max(alone) / min(alone)
        yield f"train_s_{name}", train_s
        yield f"step_s_{name}", step_s
        yield f"overlap_efficiency_{name}", worst[-1]
    versions = trainer.step
    after = trainer.stop()
    yield "adopt_s", (after["adopt_s"] - before["adopt_s"]) / (versions - before["version"])
    yield "overlap_efficiency", min(worst)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument(
        "--rounds", type=int, default=4, help="turns of bare engine and path per setting"
    )
    options_of.add_argument("--steps", type=int, default=5, help="steps per trainer speed")
    options_of.add_argument(
        "--groups", type=int, default=32, help="groups of 4 per step of the overlap part"
    )
    options_of.add_argument("--only", choices=("efficiency", "workers", "overlap"), help="one part")
    options_of.add_argument(
        "--tokens", type=int, default=64, help="completion length of the overlap part, at most 190"
    )
    options_of.add_argument("--cache", type=Path, help="for clips and tiny model; none: new ones")
    options = options_of.parse_args(arguments)
    sizes = Sizes()
    if options.smoke:
        sizes, options.rounds, options.steps, options.groups, options.tokens = SMOKE, 1, 1, 4, 24
    figures = Figures("orchestration", options.out)
    parts: list[Callable[[Stage], Figure]] = []
    if options.only in (None, "efficiency"):
        parts += [lambda stage: efficiency(stage, options.rounds), cold_pass]
    if options.only in (None, "workers"):
        parts.append(worker_pass)
    if options.only in (None, "overlap"):
        parts.append(lambda stage: overlap(stage, options.steps, options.groups, 4, options.tokens))
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = Path(name)
        with Stage(folder, options.cache or folder / "cache", sizes) as stage:
            for part in parts:
                for label, value in part(stage):
                    figures.add({label: value})
    figures.write()


if __name__ == "__main__":
    main()
