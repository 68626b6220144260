"""A rollout actor: one vLLM engine that leases prompts, generates, has the completions scored and
inserts the group.

It pulls everything (prompts, weights) and is called by nobody while it runs, so that a slow or dead
actor holds up nothing but its own leases (docs/architecture.md)."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.pending_group import PendingGroup, read_request_id
from avatar_rl.actors.scoring_loop import ScoringLoop, quarantine
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.actors.unimodal import KEPT, MOST_PARTS, WHOLE, parts_of
from avatar_rl.actors.update_policy import WeightUpdatePolicy
from avatar_rl.common.errors import AvatarError
from avatar_rl.common.heap import HeapTrimmer, no_collections
from avatar_rl.prompts.record import Prompt

if TYPE_CHECKING:
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.buffer_service.weights.receiver import ProvenWeights

IDLE_POLL_S = 0.005  # between looks for requests and versions while the engine has nothing to do
BUSY_POLL_S = 0.02
BEAT_S = 1.0
BACKLOG = 4  # engine loads that may wait for their scores
# prompts prepared within it enter the engine together: their encoders and prefill then share a pass
BUNCH_S = 0.005


class RolloutActor:
    """Plain class; the cluster makes it a Ray actor with a thread each for ``run``, ``stop`` and
    the questions.

    ``scorer`` answers ``score.remote([delivery.asked(work), ...])`` with, per group, ``[(reward |
    None, components), ...]`` or an AvatarError; ``board`` is the weight store."""

    @no_collections()
    def __init__(self, name: str, spec: RolloutSpec, scorer: Any, weight_store: Any) -> None:
        from avatar_rl.actors.engine.engine import RolloutEngine
        from avatar_rl.buffer_service.store import ReplayBuffer
        from avatar_rl.buffer_service.weights.receiver import WeightReceiver
        from avatar_rl.prompts.datasets import PromptIndex
        from avatar_rl.prompts.encoding.template import PromptEncoder
        from avatar_rl.prompts.media.loader import MediaLoader

        self.name, self.spec, self.scorer, self.weight_store = name, spec, scorer, weight_store
        self.buffer = ReplayBuffer.connect(spec.buffer, spec.run_id, url=spec.redis_url)
        self.prompts = PromptIndex.read(spec.datasets, spec.data)
        loader = MediaLoader(spec.media, base=Path("."))
        self.encoder = PromptEncoder(spec.model, loader, spec.template)
        self.engine = RolloutEngine(spec.model, spec.engine)
        self.receiver = WeightReceiver(weight_store, self.engine.version)
        self._ready: deque[PendingGroup] = deque()
        self._working: dict[str, PendingGroup] = {}
        self._held: dict[str, RequestLease] = {}  # leased and not yet acknowledged
        self._holding = (
            threading.Lock()
        )  # lest a lease that comes back is noted after its group was acknowledged
        self._incoming: deque[tuple[int, ProvenWeights]] = deque(
            maxlen=1
        )  # newest weights, not yet adopted
        self._look = threading.Event()  # there may be room, or work
        self._stop = threading.Event()
        self._drain = threading.Event()
        self._failure: BaseException | None = None
        self.tokens = self.groups = 0
        self.busy_s = self.wait_s = self.adopt_s = 0.0
        self.update_policy = WeightUpdatePolicy()
        self._heap = HeapTrimmer(active=self.engine.device == "cpu")

    def ready(self) -> dict[str, Any]:
        """Answers once the engine is up."""
        return {"name": self.name, "version": self.engine.version}

    def probe(self, prompt_ids: list[str], max_tokens: int) -> list[dict[str, Any]]:
        """Completions for the parity probe (see ``avatar_rl.actors.probe``)."""
        from avatar_rl.actors.probe import probe

        sampling = RequestSampling.of(self.spec.sampling, 1, max_tokens=max_tokens)
        asked = [self.prompts[prompt_id] for prompt_id in prompt_ids]
        return probe(self.engine, self.encoder, asked, sampling, seed=self.spec.seed)

    def run(self) -> dict[str, Any]:
        """Work until ``stop``, then give unfinished leases back. Returns the totals; raises what
        broke a thread."""
        scoring_loop = ScoringLoop(self.spec, self.buffer, self.scorer, self._settled)
        deliver = partial(scoring_loop.run, failed=lambda: self._failure is not None)
        loops = (self._feed, self._pull, deliver, self._keep_alive)
        with ThreadPoolExecutor(len(loops), thread_name_prefix="rollout") as pool:
            helpers = [pool.submit(self._guard, loop) for loop in loops]
            self._guard(partial(self._generate, scoring_loop))
            self._stop.set()
            self._look.set()
            scoring_loop.close()
            wait(helpers)
        self._stop.clear()
        self._drain.clear()
        if self._failure is not None:
            raise self._failure
        self._release()
        return self.stats()

    def stop(self) -> None:
        """Leave at once: what is unfinished is given back and generated anew by another actor."""
        self._stop.set()

    def drain(self) -> None:
        """Leave in order: lease no more, give back what has not begun, deliver the rest, then end
        ``run``."""
        self._drain.set()
        self._look.set()

    def stats(self) -> dict[str, Any]:
        """Running totals since start: tokens and groups delivered, seconds generating, waiting and
        adopting weights."""
        return {
            "version": self.engine.version,
            "tokens": self.tokens,
            "groups": self.groups,
            "busy_s": round(self.busy_s, 4),
            "wait_s": round(self.wait_s, 4),
            "adopt_s": round(self.adopt_s, 4),
            "in_flight": len(self._held),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "refused_versions": self.receiver.refused,
        }

    # -- the engine's thread -----------------------------------------------------------------------

    def _generate(self, scoring_loop: ScoringLoop) -> None:
        if self.engine.device == "cpu":
            import torch

            torch.set_num_threads(
                self.spec.engine.threads
            )  # OpenMP counts per thread; the engine was made in another
        mark = time.perf_counter()
        while self._running() and not (self._drain.is_set() and self._emptied()):
            if self._incoming and self.engine.can_adopt and self._update_is_due():
                self._adopt(*self._incoming.pop())
            if not self._incoming or self.engine.adopts_in_flight:
                self._submit_ready()
            in_flight = self.engine.in_flight
            if in_flight:
                self._step(in_flight, scoring_loop)
            now = time.perf_counter()
            spent, mark = now - mark, now
            if in_flight:
                self.busy_s += spent
            else:
                self.wait_s += spent
                self.update_policy.prefill_follows()
                time.sleep(
                    IDLE_POLL_S / 2
                )  # or spinning would starve the thread that fetches weights

    def _step(self, in_flight: int, scoring_loop: ScoringLoop) -> None:
        start = time.perf_counter()
        idle_share = self._free() / self.spec.max_sequences if self._incoming else 0.0
        for finished in self.engine.step():
            key, part = read_request_id(finished.request_id)
            work = self._working[key]
            work.finished[part] = finished
            if work.done:
                scoring_loop.put(self._working.pop(key))
                self._look.set()
        self.update_policy.stepped(time.perf_counter() - start, in_flight, idle_share=idle_share)

    def _emptied(self) -> bool:
        """Draining: give back what has not begun; whether everything else is delivered."""
        while self._ready:
            lease = self._ready.popleft().lease
            with self._holding:
                lease = self._held.pop(lease.request.key, lease)
            self.buffer.requests.release([lease])
        return not self._held

    def _update_is_due(self) -> bool:
        following = self._ready[0] if self._ready else None
        room = (
            following is not None
            and self._wants_news(following)
            and self._free() >= following.sequences
        )
        return self.update_policy.reached(len(self._working), room_for_next_step=room)

    def _wants_news(self, work: PendingGroup) -> bool:
        """It asks for newer weights than the engine's, or begins a step of the stream."""
        request = work.lease.request
        if request.min_version > self.engine.version:
            return True
        return request.step > max(
            (other.lease.request.step for other in self._working.values()), default=-1
        )

    def _free(self) -> int:
        """Sequences that the engine would run at once."""
        return max(
            0, self.spec.max_sequences - sum(work.sequences for work in self._working.values())
        )

    def _adopt(self, version: int, weights: ProvenWeights) -> None:
        start = time.perf_counter()
        self.engine.adopt(version, weights)
        self.adopt_s += time.perf_counter() - start
        self.update_policy.prefill_follows()

    def _submit_ready(self) -> None:
        """Move prepared prompts into the engine; those whose step needs a newer policy wait for
        it."""
        while self._ready:
            lease = self._ready[0].lease
            if (
                max(lease.request.min_version, lease.request.step - self.spec.max_staleness)
                > self.engine.version
            ):
                return
            work = self._ready[0]
            if self._incoming and self._wants_news(work):
                return  # submitted now it would be prefilled again when the weights come in
            self._working[lease.request.key] = (
                work  # before it leaves the queue: `_room` must not miss it
            )
            self._ready.popleft()
            try:
                for part, prepared in work.prepared.items():
                    sampling, seed = self._sampling(lease, part)
                    self.engine.submit(work.request_id(part), prepared, sampling, seed=seed)
            except AvatarError as error:
                self.engine.abort(work.request_ids)
                del self._working[lease.request.key]
                self._give_up(lease, error)

    def _sampling(self, lease: RequestLease, part: str) -> tuple[RequestSampling, int]:
        request = lease.request
        if request.kind == "eval":
            sampling = RequestSampling.of(
                self.spec.sampling,
                request.n,
                # several greedy completions would be one and the same
                temperature=0.0 if request.n == 1 else None,
                max_tokens=self.spec.evaluation_tokens,
            )
            entropy = (self.spec.seed, request.round, request.seq)
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1
            return sampling, seed
        # A request's seed depends on nothing but the run and its place in the stream: a retry
        # generates the same.
        place = (
            self.spec.seed,
            request.seq,
            *((1 + list(KEPT).index(part),) if part != WHOLE else ()),
        )
        seed = int(np.random.SeedSequence(place).generate_state(1)[0]) >> 1
        return RequestSampling.of(self.spec.sampling, request.n), seed

    # -- helper threads ----------------------------------------------------------------------------

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
        """Completions that may be leased: half a load ahead of the engine, ``BACKLOG`` loads
        unscored at most."""
        load, width = self.spec.max_sequences, MOST_PARTS if self.spec.unimodal else 1
        ahead = sum(work.sequences for work in (*self._ready, *list(self._working.values())))
        held = width * sum(lease.request.n for lease in list(self._held.values()))
        return min(load + load // 2 - ahead, BACKLOG * load - held) // width

    def _feed(self) -> None:
        """Lease prompts and preprocess their media ahead of the engine."""
        narrowest = 1  # completions of a request: with less room there is no use in asking
        while self._running() and not self._drain.is_set():
            room = self._room()
            leases = (
                self.buffer.requests.lease(
                    self.name,
                    room,
                    lease_s=self.spec.lease_s,
                    max_staleness=self.spec.max_staleness,
                    completions=room,
                )
                if room >= narrowest
                else []
            )
            with self._holding:
                # After a standstill our own expired leases come back: their work goes on, under the
                # new attempt.
                new = [lease for lease in leases if lease.request.key not in self._held]
                self._held.update((lease.request.key, lease) for lease in leases)
            self._prepare(new)
            if leases:
                narrowest = min(lease.request.n for lease in leases)
            else:
                narrowest = 1
                self._look.wait(self._poll_s())
                self._look.clear()

    def _prepare(self, leases: list[RequestLease]) -> None:
        bunch: list[PendingGroup] = []
        start = time.perf_counter()
        for lease in leases:
            try:
                prompt = self.prompts[lease.request.prompt_id]
                if (
                    lease.hinted and not prompt.hint
                ):  # the gate knows no data set; asked plainly it counts as plain
                    lease = msgspec.structs.replace(lease, hinted=False)
                parts = parts_of(
                    prompt, unimodal=self.spec.unimodal and lease.request.kind == "train"
                )
                prepared = {
                    part: self._rendered(one, lease.hinted, part) for part, one in parts.items()
                }
                if (
                    lease.request.kind == "train"
                ):  # the learner refuses longer ones, which would end the run
                    for known in prepared.values():
                        self.encoder.check_length(prompt, len(known["prompt_token_ids"]))
                bunch.append(PendingGroup(lease, prompt, prepared))
            except AvatarError as error:
                self._give_up(lease, error)
            if time.perf_counter() - start > BUNCH_S:
                self._ready.extend(bunch)
                bunch, start = [], time.perf_counter()
        self._ready.extend(bunch)

    def _rendered(self, prompt: Prompt, hinted: bool, part: str) -> Any:
        """What the engine takes, media preprocessed; a prompt that was here lately costs
        nothing."""
        known = self.engine.prepared((prompt.id, hinted, part))
        if known is None:
            engine_input = self.encoder.engine_input(prompt, hinted=hinted)
            known = self.engine.prepare(engine_input, prompt.id, key=(prompt.id, hinted, part))
        return known

    def _pull(self) -> None:
        """Fetch and verify new weights while the engine works, so that it has only to load them."""
        self.receiver.version = self.engine.version
        for version, weights in self.receiver.updates(self.buffer, self._running):
            self._incoming.append((version, self.engine.prove(weights.items())))
            del weights  # its tensors are pages of the object store, which the next version needs
            self._look.set()  # a newer version admits more requests

    def _keep_alive(self) -> None:
        """Renew leases and report progress."""
        while not self._stop.wait(min(BEAT_S, self.spec.lease_s / 3)):
            held = list(self._held.values())
            if held:
                self.buffer.requests.renew(self.name, held, lease_s=self.spec.lease_s)
            self.buffer.control.heartbeat("rollout", self.name, self.tokens)
            self.buffer.control.set_value(f"rollout/{self.name}", self.stats())
            self._heap.trim()

    def _give_up(self, lease: RequestLease, error: AvatarError) -> None:
        quarantine(self.buffer, lease, error)
        self._settled(lease.request.key, None)

    def _settled(self, key: str, tokens: int | None) -> None:
        with self._holding:
            self._held.pop(key, None)
        if tokens is not None:
            self.tokens += tokens
            self.groups += 1

    def _release(self) -> None:
        """Leave no lease behind, so that another actor can go on at once."""
        self.engine.abort()
        self._working.clear()
        self._ready.clear()
        self._incoming.clear()
        self.buffer.requests.release(list(self._held.values()))
        self._held.clear()
