"""A rollout actor: one vLLM engine that leases prompts, generates, has the completions scored and inserts the group.

It pulls everything (prompts, weights) and is called by nobody while it runs, so that a slow or dead actor holds up
nothing but its own leases (DESIGN 2).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.config import EngineConfig, SamplingConfig
from buffer_service.config import BufferConfig
from prompts.errors import AvatarError
from prompts.record import Prompt

if TYPE_CHECKING:
    from actors.engine import FinishedRequest
    from buffer_service.tickets import TicketLease

log = logging.getLogger(__name__)

POLL_S = 0.01  # between looks for work while there is none
BEAT_S = 1.0


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
    engine_input: dict[str, Any]


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
        self._ready: Queue[Work] = Queue()
        self._working: dict[str, Work] = {}
        self._held: dict[str, TicketLease] = {}  # leased and not yet acknowledged
        self._newest = 0
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
        """Work until ``stop``. Returns the totals; raises what broke a helper thread."""
        with ThreadPoolExecutor(4, thread_name_prefix="rollout") as pool:
            helpers = [pool.submit(self._guard, loop) for loop in (self._feed, self._keep_alive)]
            try:
                self._generate(pool)
            finally:
                self._stop.set()
                for helper in helpers:
                    helper.result()
        if self._failure is not None:
            raise self._failure
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

    def _generate(self, pool: ThreadPoolExecutor) -> None:
        deliveries: list[Future[None]] = []
        mark = time.perf_counter()
        while not self._stop.is_set() and self._failure is None:
            behind = self._newest > self.engine.version
            if behind and self.engine.can_adopt:
                self._adopt()
            if not behind or self.engine.adopts_in_flight:
                self._submit_ready()
            if self.engine.in_flight:
                for finished in self.engine.step():
                    work = self._working.pop(finished.request_id)
                    deliveries.append(pool.submit(self._guard, self._deliver, finished, work))
            deliveries = [delivery for delivery in deliveries if not delivery.done()]
            now = time.perf_counter()
            if self.engine.in_flight:
                self.busy_s += now - mark
            else:
                self.wait_s += now - mark
                if not self._ready.queue:
                    time.sleep(POLL_S / 4)
            mark = now

    def _submit_ready(self) -> None:
        """Move prepared prompts into the engine; those whose step needs a newer policy wait for it."""
        while self._ready.queue:
            lease = self._ready.queue[0].lease
            if max(lease.ticket.min_version, lease.ticket.step - self.spec.max_staleness) > self.engine.version:
                return
            work = self._ready.get_nowait()
            sampling, seed = self._sampling(work.lease)
            try:
                self.engine.submit(work.lease.ticket.key, work.engine_input, sampling, seed=seed)
            except AvatarError as error:
                self._give_up(work.lease, error)
                continue
            self._working[work.lease.ticket.key] = work

    def _sampling(self, lease: TicketLease) -> tuple[SamplingConfig, int]:
        ticket = lease.ticket
        if ticket.kind == "eval":
            update: dict[str, Any] = {"n": ticket.n, "temperature": 0.0}
            if self.spec.evaluation_tokens is not None:
                update["max_tokens"] = self.spec.evaluation_tokens
            return self.spec.sampling.model_copy(update=update), 0
        # A ticket's seed depends on nothing but the run and its place in the stream: a retry generates the same.
        seed = int(np.random.SeedSequence((self.spec.seed, ticket.seq)).generate_state(1)[0]) >> 1
        return self.spec.sampling.model_copy(update={"n": ticket.n}), seed

    def _adopt(self) -> None:
        import ray

        from buffer_service.weights import unpack_weights

        start = time.perf_counter()
        published = ray.get(self.board.latest.remote(self.engine.version))
        if published is None:
            return
        version, manifest, [reference] = published
        self.engine.adopt(version, unpack_weights(manifest, ray.get(reference)).items())
        self.adopt_s += time.perf_counter() - start

    # -- helper threads --------------------------------------------------------------------------------------------

    def _guard(self, function: Any, *arguments: Any) -> None:
        """Run a helper; its failure ends the actor instead of being lost in a thread."""
        try:
            function(*arguments)
        except BaseException as error:
            self._failure = self._failure or error
            raise

    def _feed(self) -> None:
        """Lease prompts and decode their media while the engine works; half an engine's load is kept ready."""
        while not self._stop.is_set() and self._failure is None:
            self._newest = max(self._newest, self.buffer.version())
            room = self.spec.max_sequences - sum(lease.ticket.n for lease in list(self._held.values()))
            leases = self.buffer.lease_tickets(
                self.name, max(0, room), lease_s=self.spec.lease_s, max_staleness=self.spec.max_staleness
            )
            for lease in leases:
                self._held[lease.ticket.key] = lease
                self._newest = max(self._newest, lease.ticket.min_version)
                try:
                    prompt = self.prompts[lease.ticket.prompt_id]
                    engine_input = self.encoder.engine_input(prompt, hinted=lease.hinted)
                except AvatarError as error:
                    self._give_up(lease, error)
                    continue
                self._ready.put(Work(lease, prompt, engine_input))
            if not leases:
                time.sleep(POLL_S)

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
        self.buffer.quarantine(lease, reason=str(error))
        self._held.pop(lease.ticket.key, None)

    def _deliver(self, finished: FinishedRequest, work: Work) -> None:
        import ray

        from actors.group import completion_facts, evaluation_payload, make_group

        ticket = work.lease.ticket
        try:
            scored = ray.get(self.scorer.score.remote(work.prompt.id, completion_facts(finished)))
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, AvatarError):
                raise
            self._give_up(work.lease, error.cause)
            return
        generated = sum(len(completion.token_ids) for completion in finished.completions)
        if ticket.kind == "eval":
            payload = evaluation_payload(work.prompt, finished, scored)
            self.buffer.add_eval(work.lease, json.dumps(payload).encode())
        else:
            group = make_group(finished, work.lease, scored, temperature=self.spec.sampling.temperature)
            self.buffer.add_group(group, work.lease, tokens_generated=generated)
        self._held.pop(work.lease.ticket.key, None)
        self.tokens += generated
        self.groups += 1
