"""The feeder: leases prompts and prepares their media ahead of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from avatar_rl.actors.groups import MAX_PARTS, WHOLE, PendingGroup, parts_of
from avatar_rl.actors.shared_state import SharedState
from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.common.errors import AvatarError
from avatar_rl.prompts.record import Prompt

if TYPE_CHECKING:
    from avatar_rl.actors.engine.engine import RolloutEngine
    from avatar_rl.actors.engine.prompt_cache import RenderedPrompt
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.buffer_service.store import ReplayBuffer
    from avatar_rl.prompts.datasets import PromptIndex
    from avatar_rl.prompts.encoding.template import PromptEncoder

# Between two looks for requests. Each look costs the engine's thread time, which matters only while
# the engine works.
IDLE_POLL_S = 0.005
BUSY_POLL_S = 0.02
MAX_UNSCORED_LOADS = 4  # engine loads that may wait for their scores
# Prompts prepared within this time enter the engine together: their encoders and their prefill then
# share a pass.
BUNCH_S = 0.005


class Feeder:
    """Fills ``SharedState.ready``. One thread calls ``run``.

    ``give_up(lease, error)`` is told of each prompt that cannot be prepared.
    """

    def __init__(
        self,
        name: str,
        spec: RolloutSpec,
        buffer: ReplayBuffer,
        prompts: PromptIndex,
        encoder: PromptEncoder,
        engine: RolloutEngine,
        state: SharedState,
        give_up: Callable[[RequestLease, AvatarError], None],
    ) -> None:
        self.name, self.spec, self.buffer, self.prompts = name, spec, buffer, prompts
        self.encoder, self.engine, self.state, self.give_up = encoder, engine, state, give_up

    def run(self) -> None:
        """Lease and prepare until the actor stops, drains or breaks."""
        smallest = 1  # completions of a request: with less room there is no use in asking
        while self.state.running and not self.state.drain.is_set():
            room = 0 if self.state.rest.is_set() else self._room()
            leases = self._lease(room) if room >= smallest else []
            self.state.preparing = bool(leases)
            # An expired lease of our own that came back goes on under its new attempt.
            self.prepare(self.state.hold(leases))
            if leases:
                smallest = min(lease.request.n for lease in leases)
            else:
                smallest = 1
                self.state.wake.wait(BUSY_POLL_S if self.engine.in_flight else IDLE_POLL_S)
                self.state.wake.clear()
        self.state.preparing = False

    def prepare(self, leases: list[RequestLease]) -> None:
        """Preprocess the media of ``leases`` and queue their groups, a bunch at a time."""
        bunch: list[PendingGroup] = []
        start = time.perf_counter()
        for lease in leases:
            try:
                bunch.append(self._pending_group(lease))
            except AvatarError as error:
                self.give_up(lease, error)
            if time.perf_counter() - start > BUNCH_S:
                self.state.ready.extend(bunch)
                bunch, start = [], time.perf_counter()
        self.state.ready.extend(bunch)

    def _room(self) -> int:
        """Completions that may be leased.

        At most half a load ahead of the engine, and ``MAX_UNSCORED_LOADS`` loads unscored.
        """
        state, load = self.state, self.spec.max_sequences
        width = MAX_PARTS if self.spec.unimodal else 1
        # `ready` before `working`: see SharedState, rule 3.
        ahead = sum(group.sequences for group in (*state.ready, *list(state.working.values())))
        held = width * sum(lease.request.n for lease in list(state.held.values()))
        return min(load + load // 2 - ahead, MAX_UNSCORED_LOADS * load - held) // width

    def _lease(self, room: int) -> list[RequestLease]:
        return self.buffer.requests.lease(
            self.name,
            room,
            lease_s=self.spec.lease_s,
            max_staleness=self.spec.max_staleness,
            completions=room,
        )

    def _pending_group(self, lease: RequestLease) -> PendingGroup:
        prompt, train = self.prompts[lease.request.prompt_id], lease.request.kind == "train"
        if lease.hinted and not prompt.hint:
            # The hint gate knows no data set. What is asked plainly has to count as plain.
            lease = msgspec.structs.replace(lease, hinted=False)
        parts = parts_of(prompt, unimodal=self.spec.unimodal and train)
        prepared = {
            part: render(self.engine, self.encoder, one, hinted=lease.hinted, part=part)
            for part, one in parts.items()
        }
        if train:  # the learner refuses longer ones, which would end the run
            for rendered in prepared.values():
                self.encoder.check_length(prompt, len(rendered["prompt_token_ids"]))
        return PendingGroup(
            lease,
            prompt,
            prepared,
            opened_tag=self.encoder.chat.opened_tag,
            decode=self.encoder.tokenizer.decode if self.spec.confidence and train else None,
        )


def render(
    engine: RolloutEngine,
    encoder: PromptEncoder,
    prompt: Prompt,
    *,
    hinted: bool,
    part: str = WHOLE,
) -> RenderedPrompt:
    """What the engine takes, media preprocessed. A prompt that was here lately costs nothing.

    ``prompt`` is the named ``part`` of the prompt with its id. Raises DataError.
    """
    key = (prompt.id, hinted, part)
    known = engine.prepared(key)
    if known is None:
        known = engine.prepare(encoder.engine_input(prompt, hinted=hinted), prompt.id, key=key)
    return known
