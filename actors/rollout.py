"""A rollout actor: one vLLM engine that leases prompts, generates, has the completions scored and inserts the group.

It pulls everything (prompts, weights) and is called by nobody while it runs, so that a slow or dead actor holds up
nothing but its own leases (DESIGN 2).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.config import EngineConfig, SamplingConfig
from buffer_service.config import BufferConfig
from prompts.errors import AvatarError, DataError
from prompts.record import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engine import FinishedRequest
    from actors.group import Scores
    from buffer_service.tickets import TicketLease

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.005  # between looks for tickets and versions while the engine has nothing to do
BUSY_POLL_S = 0.02
BEAT_S = 1.0
BACKLOG = 4  # engine loads that may wait for their scores


@dataclass(frozen=True)
class RolloutSpec:
    """All a rollout actor needs to know; plain data, sent once."""

    run_id: str
    seed: int
    model: Path
    datasets: tuple[Path, ...]
    data: Any  # prompts.config.DataConfig
    media: Any  # prompts.config.MediaConfig
    template: Any  # prompts.config.TemplateConfig
    engine: EngineConfig
    sampling: SamplingConfig
    evaluation_tokens: int | None
    buffer: BufferConfig
    redis_url: str
    max_sequences: int
    max_staleness: int
    lease_s: float


@dataclass
class Work:
    """A leased prompt on its way through the engine."""

    lease: TicketLease
    prompt: Prompt
    prepared: Any  # RolloutEngine.prepare


@dataclass
class Outcome:
    """A finished group on its way through the scorer."""

    finished: FinishedRequest
    work: Work
    scores: Future[Scores] | None = None  # None until they are asked for


class RolloutActor:
    """Plain class; the cluster makes it a Ray actor with a thread each for ``run``, ``stop`` and the questions.

    ``scorer`` answers ``score.remote(prompt_id, completions)`` with ``[(reward | None, components), ...]``;
    ``board`` is the weight board.
    """

    def __init__(self, name: str, spec: RolloutSpec, scorer: Any, board: Any) -> None:
        from actors.engine import RolloutEngine
        from buffer_service.store import ReplayBuffer
        from prompts.datasets import PromptIndex
        from prompts.media import MediaLoader
        from prompts.template import PromptEncoder

        self.name, self.spec, self.scorer, self.board = name, spec, scorer, board
        self.buffer = ReplayBuffer.connect(spec.buffer, spec.run_id, url=spec.redis_url)
        self.prompts = PromptIndex.read(spec.datasets, spec.data)
        loader = MediaLoader(spec.media, base=Path("."))
        self.encoder = PromptEncoder(spec.model, loader, spec.template)
        self.engine = RolloutEngine(spec.model, spec.engine)
        self._ready: deque[Work] = deque()
        self._working: dict[str, Work] = {}
        self._held: dict[str, TicketLease] = {}  # leased and not yet acknowledged
        self._outcomes: SimpleQueue[Outcome | None] = SimpleQueue()  # None: no more will come
        self._incoming: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=1)  # newest weights, not yet adopted
        self._look = threading.Event()  # there may be room, or work
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.tokens = self.groups = 0
        self.busy_s = self.wait_s = self.adopt_s = 0.0

    def ready(self) -> dict[str, Any]:
        """Answers once the engine is up."""
        return {"name": self.name, "version": self.engine.version}

    def probe(self, prompt_ids: list[str], max_tokens: int) -> list[dict[str, Any]]:
        """Completions for the parity probe, outside the stream: token ids, log-probabilities, prompt ids."""
        sampling = self.spec.sampling.model_copy(update={"n": 1, "max_tokens": max_tokens})
        for number, prompt_id in enumerate(prompt_ids):
            engine_input = self.encoder.engine_input(self.prompts[prompt_id], hinted=False)
            self.engine.submit(prompt_id, engine_input, sampling, seed=self.spec.seed + number)
        answers = {}
        while self.engine.in_flight:
            for finished in self.engine.step():
                completion = finished.completions[0]
                answers[finished.request_id] = {
                    "prompt_id": finished.request_id,
                    "prompt_token_ids": np.asarray(finished.prompt_token_ids, dtype=np.int32),
                    "token_ids": completion.token_ids,
                    "logprobs": completion.logprobs,
                    "text": completion.text,
                }
        return [answers[prompt_id] for prompt_id in prompt_ids]

    def run(self) -> dict[str, Any]:
        """Work until ``stop``, then give unfinished leases back. Returns the totals; raises what broke a thread."""
        loops = (self._feed, self._pull, self._deliver, self._keep_alive)
        with ThreadPoolExecutor(len(loops), thread_name_prefix="rollout") as pool:
            helpers = [pool.submit(self._guard, loop) for loop in loops]
            self._guard(self._generate)
            self._stop.set()
            self._look.set()
            self._outcomes.put(None)
            wait(helpers)
        self._stop.clear()
        if self._failure is not None:
            raise self._failure
        self._release()
        return self.stats()

    def stop(self) -> None:
        self._stop.set()

    def stats(self) -> dict[str, Any]:
        """Running totals since start: tokens and groups delivered, seconds generating, waiting and adopting weights."""
        return {
            "version": self.engine.version,
            "tokens": self.tokens,
            "groups": self.groups,
            "busy_s": round(self.busy_s, 4),
            "wait_s": round(self.wait_s, 4),
            "adopt_s": round(self.adopt_s, 4),
            "in_flight": len(self._held),
        }

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _generate(self) -> None:
        if self.engine.device == "cpu":
            import torch

            torch.set_num_threads(self.spec.engine.threads)  # OpenMP counts per thread; the engine was made in another
        mark = time.perf_counter()
        while self._running():
            if self._incoming and self.engine.can_adopt:
                self._adopt(*self._incoming.pop())
            if not self._incoming or self.engine.adopts_in_flight:
                self._submit_ready()
            if self.engine.in_flight:
                for finished in self.engine.step():
                    self._outcomes.put(Outcome(finished, self._working.pop(finished.request_id)))
                    self._look.set()
            now = time.perf_counter()
            if self.engine.in_flight:
                self.busy_s += now - mark
            else:
                self.wait_s += now - mark
                if not self._ready:
                    time.sleep(IDLE_POLL_S / 2)
            mark = now

    def _at_a_boundary(self) -> bool:
        """New weights make the engine prefill everything in flight again, so they are taken in between two steps of the
        stream, when that is little: nothing in flight, or the next prompt is of a later step or asks for them."""
        if not self._working:
            return True
        if not self._ready:
            return False
        ticket = self._ready[0].lease.ticket
        return ticket.min_version > self.engine.version or ticket.step > max(
            work.lease.ticket.step for work in self._working.values()
        )

    def _adopt(self, version: int, weights: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        self.engine.adopt(version, weights.items())
        self.adopt_s += time.perf_counter() - start

    def _submit_ready(self) -> None:
        """Move prepared prompts into the engine; those whose step needs a newer policy wait for it."""
        while self._ready:
            lease = self._ready[0].lease
            if max(lease.ticket.min_version, lease.ticket.step - self.spec.max_staleness) > self.engine.version:
                return
            work = self._ready[0]
            sampling, seed = self._sampling(work.lease)
            self._working[lease.ticket.key] = work  # before it leaves the queue: `_room` must not miss it
            self._ready.popleft()
            try:
                self.engine.submit(lease.ticket.key, work.prepared, sampling, seed=seed)
            except AvatarError as error:
                del self._working[lease.ticket.key]
                self._give_up(lease, error)

    def _sampling(self, lease: TicketLease) -> tuple[SamplingConfig, int]:
        ticket = lease.ticket
        if ticket.kind == "eval":
            update: dict[str, Any] = {"n": ticket.n}
            if ticket.n == 1:
                update["temperature"] = 0.0  # several greedy completions would be one and the same
            if self.spec.evaluation_tokens is not None:
                update["max_tokens"] = self.spec.evaluation_tokens
            entropy = (self.spec.seed, ticket.round, ticket.seq)
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1
            return self.spec.sampling.model_copy(update=update), seed
        # A ticket's seed depends on nothing but the run and its place in the stream: a retry generates the same.
        seed = int(np.random.SeedSequence((self.spec.seed, ticket.seq)).generate_state(1)[0]) >> 1
        return self.spec.sampling.model_copy(update={"n": ticket.n}), seed

    # -- helper threads --------------------------------------------------------------------------------------------

    def _guard(self, loop: Callable[[], None]) -> None:
        """Run a loop; its failure ends the actor instead of being lost in a thread."""
        try:
            loop()
        except BaseException as error:
            self._failure = self._failure or error
            self._look.set()

    def _running(self) -> bool:
        return not self._stop.is_set() and self._failure is None

    def _poll_s(self) -> float:
        """Looking for news costs the engine's thread time, which matters only while it works."""
        return BUSY_POLL_S if self.engine.in_flight else IDLE_POLL_S

    def _room(self) -> int:
        """Sequences that may be leased: half a load ahead of the engine, in all at most ``BACKLOG`` loads unscored."""
        load = self.spec.max_sequences
        ahead = sum(work.lease.ticket.n for work in (*self._ready, *list(self._working.values())))
        held = sum(lease.ticket.n for lease in list(self._held.values()))
        return min(load + load // 2 - ahead, BACKLOG * load - held)

    def _feed(self) -> None:
        """Lease prompts and preprocess their media ahead of the engine."""
        widest = self.spec.max_sequences  # how many completions a ticket asks for is known once it is leased
        while self._running():
            count = self._room() // widest
            leases = self.buffer.lease_tickets(
                self.name, count, lease_s=self.spec.lease_s, max_staleness=self.spec.max_staleness
            ) if count > 0 else []  # fmt: skip
            for lease in leases:
                self._held[lease.ticket.key] = lease
            for lease in leases:
                try:
                    self._ready.append(self._prepare(lease))
                except AvatarError as error:
                    self._give_up(lease, error)
            if leases:
                widest = min(self.spec.max_sequences, max(lease.ticket.n for lease in leases))
            else:
                self._look.wait(self._poll_s())
                self._look.clear()

    def _prepare(self, lease: TicketLease) -> Work:
        prompt = self.prompts[lease.ticket.prompt_id]
        engine_input = self.encoder.engine_input(prompt, hinted=lease.hinted)
        return Work(lease, prompt, self.engine.prepare(engine_input, lease.ticket.key))

    def _pull(self) -> None:
        """Fetch and verify new weights while the engine works, so that it has only to load them."""
        import ray

        from buffer_service.weights import unpack_weights

        fetched = self.engine.version
        while self._running():
            if self.buffer.version() > fetched:
                published = ray.get(self.board.latest.remote(fetched))
                if published is not None:
                    fetched, manifest, [reference] = published
                    self._incoming.append((fetched, unpack_weights(manifest, ray.get(reference))))
                self._look.set()  # a newer version admits more tickets
            self._stop.wait(self._poll_s())

    def _keep_alive(self) -> None:
        """Renew leases and report progress."""
        while not self._stop.wait(min(BEAT_S, self.spec.lease_s / 3)):
            held = list(self._held.values())
            if held:
                self.buffer.renew(self.name, held, lease_s=self.spec.lease_s)
            self.buffer.beat("rollout", self.name, self.tokens)
            self.buffer.put_fact(f"rollout/{self.name}", self.stats())

    def _give_up(self, lease: TicketLease, error: AvatarError) -> None:
        """A prompt that cannot be asked is quarantined with its reason; the run goes on."""
        log.warning("prompt %s quarantined: %s", lease.ticket.prompt_id, error)
        self.buffer.quarantine(lease, reason=type(error).__name__, detail=str(error))
        self._held.pop(lease.ticket.key, None)

    def _deliver(self) -> None:
        """Have finished groups scored, many at a time, and insert each as its scores arrive."""
        from actors.group import completion_facts

        scoring, stopping = 0, False
        while scoring or not stopping:
            outcome = self._outcomes.get()
            if outcome is None:
                if self._failure is not None:
                    return
                stopping = True
            elif outcome.scores is None:
                reference = self.scorer.score.remote(outcome.work.prompt.id, completion_facts(outcome.finished))
                outcome.scores = reference.future()
                outcome.scores.add_done_callback(partial(self._scored, outcome))
                scoring += 1
            else:
                scoring -= 1
                self._insert(outcome)

    def _scored(self, outcome: Outcome, _: Future[Scores]) -> None:
        self._outcomes.put(outcome)

    def _insert(self, outcome: Outcome) -> None:
        import ray

        from actors.group import evaluation_payload, make_group

        finished, lease = outcome.finished, outcome.work.lease
        assert outcome.scores is not None
        try:
            scores = outcome.scores.result()
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, AvatarError):
                raise
            self._give_up(lease, error.cause)
            return
        generated = sum(len(completion.token_ids) for completion in finished.completions)
        if lease.ticket.kind == "eval":
            payload = evaluation_payload(outcome.work.prompt, finished, scores)
            self.buffer.add_eval(lease, json.dumps(payload).encode())
        else:
            try:
                group = make_group(finished, lease, scores, temperature=self.spec.sampling.temperature)
            except DataError as error:
                self._give_up(lease, error)
                return
            self.buffer.add_group(group, lease, tokens_generated=generated)
        self._held.pop(lease.ticket.key, None)
        self.tokens += generated
        self.groups += 1

    def _release(self) -> None:
        """Leave no lease behind, so that another actor can go on at once."""
        self.engine.abort()
        self._working.clear()
        self._ready.clear()
        self._incoming.clear()
        self.buffer.release(list(self._held.values()))
        self._held.clear()
