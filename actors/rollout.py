"""A rollout actor: one vLLM engine that leases prompts, generates, has the completions scored and
inserts the groups.

It pulls everything (prompts, weights) and nobody calls it while it runs. So a slow or dead actor
holds up nothing but its own leases (docs/architecture.md).
"""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.feeder import Feeder, render
from avatar_rl.actors.generation import Generation
from avatar_rl.actors.scoring_loop import ScoringLoop
from avatar_rl.actors.shared_state import SharedState
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.actors.update_policy import WeightUpdatePolicy
from avatar_rl.common.errors import DataError
from avatar_rl.common.process import HeapTrimmer, name_log, no_collections
from avatar_rl.common.turn_lock import TurnLock

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from ray.actor import ActorHandle

    from avatar_rl.actors.prompt_workers import PromptWorkers
    from avatar_rl.buffer_service.weights.receiver import WeightReceiver
    from avatar_rl.buffer_service.weights.road_receiver import RoadReceiver
    from avatar_rl.common.types import JsonObject

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


class ProbeCompletion(TypedDict):
    """One completion of the parity probe."""

    prompt_id: str
    prompt_token_ids: NDArray[np.int32]  # (L,) placeholders expanded
    token_ids: NDArray[np.int32]  # (T,)
    logprobs: NDArray[np.float32]  # (T,)
    text: str


class RolloutActor:
    """Owns the engine and starts and joins the five threads of a run (see ``SharedState``).

    A plain class; the cluster makes it a Ray actor with a thread each for ``run``, ``stop`` and the
    questions. ``scorer`` is a reward actor, or None (``ScoringLoop``); ``weight_store`` the weight
    store.
    """

    @no_collections()
    def __init__(
        self, name: str, spec: RolloutSpec, scorer: ActorHandle | None, weight_store: ActorHandle
    ) -> None:
        from avatar_rl.buffer_service.control import StartBeats
        from avatar_rl.buffer_service.store import ReplayBuffer

        name_log(name)
        self.name, self.spec, self.scorer, self.weight_store = name, spec, scorer, weight_store
        self.buffer = ReplayBuffer.connect(
            spec.buffer, spec.run_id, url=spec.redis_url, create=False
        )
        self._starting = StartBeats(self.buffer.control, "rollout", name)
        try:
            self._load()
        except BaseException:
            self._starting.end()
            raise

    def _load(self) -> None:
        """The engine and what it is fed with: imports vLLM and torch."""
        from avatar_rl.actors.engine.engine import RolloutEngine
        from avatar_rl.actors.engine.stored_media import StoredMedia
        from avatar_rl.actors.engine_turn import EngineTurn
        from avatar_rl.buffer_service.weights.receiver import WeightReceiver
        from avatar_rl.prompts.datasets import PromptIndex
        from avatar_rl.prompts.encoding.template import PromptEncoder
        from avatar_rl.prompts.media.loader import MediaLoader

        spec = self.spec
        self.prompts = PromptIndex.read(spec.datasets, spec.data)
        loader = MediaLoader(spec.media, base=Path("."))
        self.encoder = PromptEncoder(spec.model, loader, spec.template)
        lock = TurnLock(spec.turn_lock, self.name) if spec.turn_lock is not None else None
        if lock is not None:
            lock.take()
        stored = None
        if (store := spec.stored) is not None:
            stored = StoredMedia.open(spec.model, store.folder, store.bytes, store.dtype)
        self.engine = RolloutEngine(
            spec.model,
            spec.engine,
            adapter=spec.adapter,
            sleeps=lock is not None,
            records_experts=spec.records_experts,
            stored=stored,
        )
        self.receiver = self._open_receiver(WeightReceiver(self.weight_store, self.engine.version))
        self.workers = self._prompt_workers()
        if self.workers is not None:
            self.workers.start()
        self.state = SharedState()
        self.turn = EngineTurn(self.engine, self.state, lock) if lock is not None else None
        self.update_policy = WeightUpdatePolicy()
        self._heap = HeapTrimmer(active=self.engine.device == "cpu")

    def _prompt_workers(self) -> PromptWorkers | None:
        """Processes that prepare prompts; None where there are none, or no media."""
        from avatar_rl.actors.prompt_workers import PromptWorkers, PromptWorkerSpec
        from avatar_rl.prompts.encoding.rope import MULTIMODAL

        spec = self.spec
        count = spec.engine.media_workers_on(self.engine.device, cores=os.cpu_count() or 1)
        if not count or self.encoder.kind not in MULTIMODAL:
            return None
        stored = self.engine.stored
        settings = PromptWorkerSpec(
            spec.model,
            spec.media,
            spec.template,
            self.engine.settings,
            "" if stored is None else stored.revision,
        )
        return PromptWorkers(settings, count)

    def _open_receiver(self, board: WeightReceiver) -> WeightReceiver | RoadReceiver:
        """What hears of new versions; the engine's workers become members of the transfers."""
        from avatar_rl.buffer_service.weights.member import MemberSettings
        from avatar_rl.buffer_service.weights.news import Noticeboard
        from avatar_rl.buffer_service.weights.road_receiver import RoadReceiver

        spec = self.spec
        if spec.transport == "board":
            return board
        settings = MemberSettings(self.name, spec.buffer, spec.run_id, spec.redis_url)
        members = self.engine.join_transfers(spec.transport, settings)
        notices = Noticeboard(spec.buffer, spec.run_id, spec.redis_url)
        return RoadReceiver(notices, board, members)

    def ready(self) -> JsonObject:
        """Answers once the engine is up."""
        return {"name": self.name, "version": self.engine.version}

    def probe(self, prompt_ids: list[str], wanted: int, max_tokens: int) -> list[ProbeCompletion]:
        """One completion each of the first ``wanted`` prompts that can be trained on, in order,
        outside the stream: for the learner to compare its log-probabilities with. The engine must
        be idle.

        Prompts that training sets aside, with broken media or above max_prompt_tokens, are left out
        here, too. Raises the first one's DataError where all of them are.
        """
        sampling = RequestSampling.of(self.spec.sampling, 1, max_tokens=max_tokens)
        faults: list[DataError] = []
        asked: list[str] = []
        for prompt_id in prompt_ids:
            if len(asked) == wanted:
                break
            prompt = self.prompts[prompt_id]
            try:
                rendered = render(self.engine, self.encoder, prompt, hinted=False)
                self.encoder.check_length(prompt, len(rendered["prompt_token_ids"]))
                seed = self.spec.seed + len(asked)
                self.engine.submit(prompt_id, rendered, sampling, seed=seed)
            except DataError as error:
                log.warning("parity probe: prompt %s is left out: %s", prompt_id, error)
                faults.append(error)
            else:
                asked.append(prompt_id)
        if faults and not asked:
            raise faults[0]
        answers: dict[str, ProbeCompletion] = {}
        while self.engine.in_flight:
            for finished in self.engine.step():
                completion = finished.completions[0]
                answers[finished.request_id] = {
                    "prompt_id": finished.request_id,
                    "prompt_token_ids": finished.prompt_token_ids,
                    "token_ids": completion.token_ids,
                    "logprobs": completion.logprobs,
                    "text": completion.text,
                }
        return [answers[prompt_id] for prompt_id in asked]

    def run(self) -> JsonObject:
        """Work until ``stop`` or ``drain``, then give unfinished leases back.

        Returns the totals. Raises what broke a thread; then the leases are left to expire.
        """
        state = self.state
        self._starting.end()  # ``_keep_alive`` beats from now on
        if self.workers is not None:
            self.workers.start()  # of an earlier ``run`` they have ended
        scoring_loop = ScoringLoop(self.spec, self.buffer, self.scorer, state)
        feeder = Feeder(
            self.name,
            self.spec,
            self.buffer,
            self.prompts,
            self.encoder,
            self.engine,
            state,
            scoring_loop.give_up,
            self.workers,
        )
        generation = Generation(
            self.spec, self.buffer, self.engine, state, self.update_policy, scoring_loop, self.turn
        )
        if self.turn is not None:
            self.turn.loops(True)
        loops = (feeder.run, self._receive_weights, scoring_loop.run, self._keep_alive)
        with ThreadPoolExecutor(len(loops), thread_name_prefix="rollout") as pool:
            helpers = [pool.submit(state.guard, loop) for loop in loops]
            state.guard(generation.run)
            state.stop.set()
            state.wake.set()
            scoring_loop.close()
            wait(helpers)
        if self.workers is not None:
            self.workers.close()
        state.stop.clear()
        state.drain.clear()
        if state.failure is not None:
            raise state.failure
        self._release()
        if self.turn is not None:
            self.turn.loops(False)
        return self.stats()

    def stop(self) -> None:
        """Leave at once: what is unfinished is given back, and another actor generates it anew."""
        self.state.stop.set()

    def drain(self) -> None:
        """Leave in order: lease no more, give back what has not begun, deliver the rest, then end
        ``run``."""
        self.state.drain.set()
        self.state.wake.set()

    def end_turn(self) -> None:
        """Colocated: finish what is in the engine, put it to sleep and leave the device to the
        learner. Returns once that is done."""
        if self.turn is not None:
            self.turn.end()

    def begin_turn(self) -> None:
        """Colocated: the device is the engine's again. Returns once it is awake."""
        if self.turn is not None:
            self.turn.begin()

    def stats(self) -> JsonObject:
        """Totals since the actor was made: tokens and groups delivered, seconds generating, waiting
        and taking weights in. Besides, the engine's version and where the actor runs."""
        totals = self.state.totals
        return {
            "version": self.engine.version,
            "tokens": totals.tokens,
            "groups": totals.groups,
            "busy_s": round(totals.busy_s, 4),
            "wait_s": round(totals.wait_s, 4),
            "adopt_s": round(totals.adopt_s, 4),
            "in_flight": len(self.state.held),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "refused_versions": self.receiver.refused,
        }

    def _receive_weights(self) -> None:
        """Fetch and verify new weights while the engine works, so that it has only to load them."""
        self.receiver.version = self.engine.version
        for version, weights in self.receiver.updates(self.buffer, lambda: self.state.running):
            if isinstance(weights, dict):
                self.state.incoming.append((version, self.engine.prove(weights.items())))
            else:  # its workers hold it, and have checked it
                self.state.incoming.append((version, weights))
            del weights  # its tensors are pages of the object store, which the next version needs
            self.state.wake.set()  # a newer version admits more requests

    def _keep_alive(self) -> None:
        """Renew leases and report progress."""
        while not self.state.stop.wait(min(HEARTBEAT_S, self.spec.lease_s / 3)):
            held = list(self.state.held.values())
            if held:
                self.buffer.requests.renew(self.name, held, lease_s=self.spec.lease_s)
            # One that waits for room in the buffer does not hang.
            progress = self.state.totals.tokens + self.buffer.refusals
            self.buffer.control.heartbeat("rollout", self.name, progress)
            self.buffer.control.set_value(f"rollout/{self.name}", self.stats())
            self._heap.trim()

    def _release(self) -> None:
        """Leave no lease behind, so that another actor can continue at once."""
        self.engine.abort()
        self.buffer.requests.release(self.state.clear())
