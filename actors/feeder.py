"""The feeder: leases prompts and prepares their media ahead of the engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
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
    from avatar_rl.actors.prompt_workers import Prepared, PromptWorkers
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.buffer_service.store import ReplayBuffer
    from avatar_rl.prompts.datasets import PromptIndex
    from avatar_rl.prompts.encoding.template import PromptEncoder

log = logging.getLogger(__name__)

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

    ``give_up(lease, error)`` is told of each prompt that cannot be prepared. With ``workers`` media
    are preprocessed in other processes, and this thread only hands on.
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
        workers: PromptWorkers | None = None,
    ) -> None:
        self.name, self.spec, self.buffer, self.prompts = name, spec, buffer, prompts
        self.encoder, self.engine, self.state, self.give_up = encoder, engine, state, give_up
        self.workers = workers
        self._under_way: list[_Begun] = []  # in the order of their leases

    def run(self) -> None:
        """Lease and prepare until the actor stops, drains or breaks."""
        smallest = 1  # completions of a request: with less room there is no use in asking
        while self.state.running and not self.state.drain.is_set():
            room = 0 if self.state.rest.is_set() else self._room()
            leases = self._lease(room) if room >= smallest else []
            self.state.preparing = bool(leases or self._under_way)
            # An expired lease of our own that came back goes on under its new attempt.
            self.prepare(self.state.hold(leases))
            if leases:
                smallest = min(lease.request.n for lease in leases)
            else:
                smallest = 1
                self.state.wake.wait(BUSY_POLL_S if self.engine.in_flight else IDLE_POLL_S)
                self.state.wake.clear()
        self.state.preparing = False
        if self.state.running:
            self._give_back()

    def prepare(self, leases: list[RequestLease]) -> None:
        """Preprocess the media of ``leases`` and queue their groups, a bunch at a time; and those
        that workers have done meanwhile."""
        start = time.perf_counter()
        for lease in leases:
            try:
                self._under_way.append(self._begun(lease))
            except AvatarError as error:
                self.give_up(lease, error)
            if time.perf_counter() - start > BUNCH_S:
                self._queue_done()
                start = time.perf_counter()
        self._queue_done()

    def _queue_done(self) -> None:
        """Queue what is prepared. A group may pass others of its own step, for one with a long
        clip would hold them all up, but none of an earlier step."""
        left: list[_Begun] = []
        bunch: list[PendingGroup] = []
        earliest = math.inf  # step of those that are left
        for begun in self._under_way:
            if not begun.done or begun.step > earliest:
                left.append(begun)
                earliest = min(earliest, begun.step)
                continue
            try:
                bunch.append(self._pending_group(begun))
            except AvatarError as error:
                self.give_up(begun.lease, error)
        # `ready` first: `_room` may count a group twice, but must not miss one.
        self.state.ready.extend(bunch)
        self._under_way = left

    def _give_back(self) -> None:
        """The actor drains: what is with a worker has not begun."""
        leases = [self.state.take_back(begun.lease) for begun in self._under_way]
        self._under_way = []
        if leases:
            self.buffer.requests.release(leases)

    def _room(self) -> int:
        """Completions that may be leased.

        At most half a load ahead of the engine, and ``MAX_UNSCORED_LOADS`` loads unscored.
        """
        state, load = self.state, self.spec.max_sequences
        width = MAX_PARTS if self.spec.unimodal else 1
        # `ready` before `working`: see SharedState, rule 3.
        ahead = sum(begun.sequences for begun in self._under_way)
        ahead += sum(group.sequences for group in (*state.ready, *list(state.working.values())))
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

    def _begun(self, lease: RequestLease) -> _Begun:
        """The group with what is there of it. Media are handed to a worker where one is up, else
        preprocessed here. Raises DataError."""
        prompt, train = self.prompts[lease.request.prompt_id], lease.request.kind == "train"
        if lease.hinted and not prompt.hint:
            # The hint gate knows no data set. What is asked plainly has to count as plain.
            lease = msgspec.structs.replace(lease, hinted=False)
        begun = _Begun(lease, prompt, parts_of(prompt, unimodal=self.spec.unimodal and train))
        workers = self.workers
        if workers is None or not workers.up or not prompt.media.items:
            self._prepare_here(begun)
            return begun
        for part in begun.parts:
            known = self.engine.prepared((prompt.id, lease.hinted, part))
            if known is not None:
                begun.prepared[part] = known
        missing = {part: one for part, one in begun.parts.items() if part not in begun.prepared}
        if missing:
            begun.asked = workers.ask(missing, hinted=lease.hinted)
            begun.asked.add_done_callback(lambda _: self.state.wake.set())
        return begun

    def _prepare_here(self, begun: _Begun) -> None:
        for part, one in begun.parts.items():
            begun.prepared[part] = render(
                self.engine, self.encoder, one, hinted=begun.lease.hinted, part=part
            )

    def _pending_group(self, begun: _Begun) -> PendingGroup:
        lease, prompt, train = begun.lease, begun.prompt, begun.lease.request.kind == "train"
        if begun.asked is not None:
            self._take(begun, begun.asked)
        for rendered in begun.prepared.values():
            if train:  # the learner refuses longer ones, which would end the run
                self.encoder.check_length(prompt, len(rendered["prompt_token_ids"]))
            if self.engine.stored is not None:
                self.engine.stored.fetch(rendered)
        return PendingGroup(
            lease,
            prompt,
            {part: begun.prepared[part] for part in begun.parts},
            opened_tag=self.encoder.chat.opened_tag,
            decode=self.encoder.tokenizer.decode if self.spec.confidence and train else None,
        )

    def _take(self, begun: _Begun, asked: Future[Mapping[str, Prepared]]) -> None:
        """What a worker made. Raises DataError where the prompt is at fault."""
        try:
            found = asked.result()
        except AvatarError:
            raise
        except Exception as error:  # of the worker
            log.warning("prompt %s is prepared in the actor itself: %s", begun.prompt.id, error)
            self._prepare_here(begun)
            return
        for part, (rendered, names) in found.items():
            key = (begun.prompt.id, begun.lease.hinted, part)
            begun.prepared[part] = self.engine.keep(key, rendered)
            if self.engine.stored is not None:
                self.engine.stored.note(names)


@dataclass
class _Begun:
    """A leased prompt whose media are being preprocessed."""

    lease: RequestLease
    prompt: Prompt
    parts: Mapping[str, Prompt]  # the whole prompt first
    prepared: dict[str, RenderedPrompt] = field(default_factory=dict)  # by part, as far as known
    asked: Future[Mapping[str, Prepared]] | None = None  # the others, of a worker

    @property
    def done(self) -> bool:
        return self.asked is None or self.asked.done()

    @property
    def step(self) -> int:
        return self.lease.request.step

    @property
    def sequences(self) -> int:
        """Completions that the engine will generate for it."""
        return self.lease.request.n * len(self.parts)


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
        engine_input = encoder.engine_input(prompt, hinted=hinted)
        known = engine.prepare(engine_input, prompt.id, key=key)
        if engine.stored is not None:
            engine.stored.note_prompt(encoder.loader, prompt, engine_input, known)
    return known
