"""Generation: the engine's thread. It submits prepared groups, steps, and takes new weights in."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.engine_turn import EngineTurn
from avatar_rl.actors.gathering import GatherPolicy
from avatar_rl.actors.groups import UNIMODAL, WHOLE, PendingGroup, read_request_id
from avatar_rl.actors.scoring_loop import ScoringLoop
from avatar_rl.actors.shared_state import SharedState
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.actors.update_policy import WeightUpdatePolicy
from avatar_rl.common.errors import AvatarError

if TYPE_CHECKING:
    from avatar_rl.actors.engine.engine import RolloutEngine
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.buffer_service.store import ReplayBuffer
    from avatar_rl.buffer_service.weights.receiver import ProvenWeights
    from avatar_rl.buffer_service.weights.road_receiver import HeldWeights

IDLE_S = 0.0025  # between two looks for work; without a sleep it would starve the other threads


class Generation:
    """The only user of the engine while the actor runs. One thread calls ``run``."""

    def __init__(
        self,
        spec: RolloutSpec,
        buffer: ReplayBuffer,
        engine: RolloutEngine,
        state: SharedState,
        update_policy: WeightUpdatePolicy,
        scoring_loop: ScoringLoop,
        turn: EngineTurn | None = None,
    ) -> None:
        self.spec, self.buffer, self.engine, self.state = spec, buffer, engine, state
        self.update_policy, self.scoring_loop = update_policy, scoring_loop
        self.turn = turn  # of an engine that shares its device
        self.gather_policy = GatherPolicy(spec.max_sequences)

    def run(self) -> None:
        """Generate until the actor stops or breaks, or has delivered all when it drains."""
        state = self.state
        if self.engine.device == "cpu":
            import torch

            # OpenMP counts per thread, and the engine was made in another.
            torch.set_num_threads(self.spec.engine.threads)
        mark = time.perf_counter()
        while state.running and not (state.drain.is_set() and self._drained()):
            if self.turn is not None and self.turn.is_due and not self.engine.in_flight:
                self.turn.pass_on()
                continue
            if state.incoming and self.engine.can_adopt and self._update_is_due():
                self._adopt(*state.incoming.pop())
            if not state.incoming or self.engine.adopts_in_flight:
                self._submit_ready()
            in_flight = self.engine.in_flight
            steps = not self._gathers() and in_flight > 0
            if steps:
                self._step(in_flight)
            now = time.perf_counter()
            spent, mark = now - mark, now
            if steps:
                state.totals.busy_s += spent
                continue
            state.totals.wait_s += spent
            if not in_flight:
                self.update_policy.prefill_follows()
            time.sleep(IDLE_S)

    def _gathers(self) -> bool:
        """Whether the engine waits for more questions of an evaluation before it steps."""
        state = self.state
        working = state.working.values()
        if any(group.lease.request.kind != "eval" for group in working):
            return False  # a step of training waits for its groups
        in_flight = sum(group.sequences for group in working)
        return self.gather_policy.waits(in_flight, state.preparing, time.monotonic())

    def _step(self, in_flight: int) -> None:
        working, start = self.state.working, time.perf_counter()
        idle_share = self._free() / self.spec.max_sequences if self.state.incoming else 0.0
        for finished in self.engine.step():
            key, part = read_request_id(finished.request_id)
            group = working[key]
            group.finished[part] = finished
            if group.done:
                self.scoring_loop.put(working.pop(key))
                self.state.wake.set()
        self.update_policy.stepped(time.perf_counter() - start, in_flight, idle_share=idle_share)

    def _free(self) -> int:
        """Sequences that the engine would run beside those it has."""
        taken = sum(group.sequences for group in self.state.working.values())
        return max(0, self.spec.max_sequences - taken)

    def _drained(self) -> bool:
        """Give back what has not begun; whether everything else is delivered."""
        while self.state.ready:
            lease = self.state.take_back(self.state.ready.popleft().lease)
            self.buffer.requests.release([lease])
        return not self.state.held

    # -- new weights -------------------------------------------------------------------------------

    def _update_is_due(self) -> bool:
        if self.engine.adopts_free:
            return True
        following = self.state.ready[0] if self.state.ready else None
        room = (
            following is not None
            and self._wants_update(following)
            and self._free() >= following.sequences
        )
        return self.update_policy.is_due(len(self.state.working), room_for_next_step=room)

    def _wants_update(self, group: PendingGroup) -> bool:
        """It asks for newer weights than the engine's, or begins a step of the stream."""
        request = group.lease.request
        if request.min_version > self.engine.version:
            return True
        steps = (other.lease.request.step for other in self.state.working.values())
        return request.step > max(steps, default=-1)

    def _adopt(self, version: int, weights: ProvenWeights | HeldWeights) -> None:
        start = time.perf_counter()
        adopted = self.engine.adopt(version, weights)
        self.state.totals.adopt_s += time.perf_counter() - start
        if adopted and not self.engine.adopts_free:
            self.update_policy.prefill_follows()

    # -- new requests ------------------------------------------------------------------------------

    def _submit_ready(self) -> None:
        """Move prepared groups into the engine, until one has to wait for newer weights."""
        state = self.state
        while state.ready and not state.rest.is_set():
            group = state.ready[0]
            request = group.lease.request
            oldest = max(request.min_version, request.step - self.spec.max_staleness)
            if oldest > self.engine.version:
                return
            if state.incoming and self._wants_update(group):
                return  # submitted now it would be prefilled again when the weights come in
            state.working[group.key] = group  # before it leaves `ready`: SharedState, rule 3
            state.ready.popleft()
            self._submit(group)

    def _submit(self, group: PendingGroup) -> None:
        try:
            for part, rendered in group.prepared.items():
                sampling, seed = self._sampling(group.lease, part)
                self.engine.submit(group.request_id(part), rendered, sampling, seed=seed)
        except AvatarError as error:
            self.engine.abort(group.request_ids)
            del self.state.working[group.key]
            self.scoring_loop.give_up(group.lease, error)

    def _sampling(self, lease: RequestLease, part: str) -> tuple[RequestSampling, int]:
        """How a part is sampled, and its seed.

        The seed depends on nothing but the run and the request's place in the stream: a retry
        generates the same.
        """
        request, config = lease.request, self.spec.sampling
        if request.kind == "eval":
            sampling = RequestSampling.of(
                config,
                request.n,
                # several greedy completions would be one and the same
                temperature=0.0 if request.n == 1 else None,
                max_tokens=self.spec.evaluation_tokens,
            )
            return sampling, _seed(self.spec.seed, request.round, request.seq)
        place = (request.seq,) if part == WHOLE else (request.seq, 1 + list(UNIMODAL).index(part))
        return RequestSampling.of(config, request.n), _seed(self.spec.seed, *place)


def _seed(*entropy: int) -> int:
    """A seed of 31 bits from these numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1
