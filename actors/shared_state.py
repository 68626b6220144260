"""What the threads of a rollout actor share, and the rules by which they do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avatar_rl.actors.groups import PendingGroup
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.buffer_service.weights.receiver import ProvenWeights
    from avatar_rl.buffer_service.weights.road_receiver import HeldWeights


@dataclass
class RolloutTotals:
    """Running totals since the actor was made, over all its runs."""

    tokens: int = 0  # delivered, as groups
    groups: int = 0
    busy_s: float = 0.0  # the engine had requests
    wait_s: float = 0.0  # it had none, or waited for more
    adopt_s: float = 0.0  # of both: taking weights in


class SharedState:
    """The fields that more than one of an actor's five threads touches.

    ========= ==================================== ==============================================
    thread    runs                                 writes
    ========= ==================================== ==============================================
    engine    ``Generation.run``                   ``working``; takes from ``ready`` and
                                                   ``incoming``; ``busy_s, wait_s, adopt_s``
    feeder    ``Feeder.run``                       adds to ``ready``; notes leases in ``held``;
                                                   ``preparing``
    scoring   ``ScoringLoop.run``                  ``tokens, groups``
    weights   ``RolloutActor._receive_weights``    adds to ``incoming``
    heartbeat ``RolloutActor._keep_alive``         nothing; it reads ``held`` and the totals
    ========= ==================================== ==============================================

    Threads of Ray's call ``RolloutActor.stop``, ``drain``, ``end_turn`` and ``stats``: they set
    events and read.

    A group is in ``held`` from its lease until it is settled. Meanwhile it is prepared, then in
    ``ready``, then in ``working``, then with the scoring loop. The scoring loop settles it when it
    is delivered or dropped; any of the first three threads when its prompt cannot be asked or
    scored. A draining actor takes back what is still in ``ready``.

    Rules:

    1. The only lock guards ``held``. After a standstill the actor's own expired leases come back
       to it under a new attempt. ``hold`` looks whether the group is known and notes its lease in
       one step, so that no ``settle`` falls in between. Otherwise the lease of a group that was
       just acknowledged would be noted, and renewed for ever.
    2. All else rests on one writer for each end of a queue and on atomic operations of ``deque``
       and ``dict``. Readers of ``held`` and ``working`` copy them first.
    3. A group enters ``working`` before it leaves ``ready``, and the feeder reads ``ready`` first.
       So the feeder may count a group twice for a moment and then leases less. It never misses
       one, which would make it lease more than the engine can take.
    4. ``incoming`` has room for one version: a newer one replaces it. The engine's thread takes it
       between two steps.
    5. ``wake`` ends the feeder's sleep: there may be room, a newer version that admits more
       requests, media that a worker process has prepared, or a reason to end.
    6. While ``rest`` is set nothing is leased and nothing enters the engine: the learner has the
       device, or will (engine_turn.py).
    7. The first failure of any thread is kept in ``failure`` and ends all loops (``running``).
       The leases then expire and other actors take them; a broken actor is not used again.
    """

    def __init__(self) -> None:
        self.ready: deque[PendingGroup] = deque()  # prepared, in the order of their leases
        self.preparing = False  # the feeder or a worker is at it: more comes into ``ready``
        self.working: dict[str, PendingGroup] = {}  # in the engine, by request key
        self.held: dict[str, RequestLease] = {}  # leased and not yet settled, by request key
        self._held_lock = threading.Lock()
        self.incoming: deque[tuple[int, ProvenWeights | HeldWeights]] = deque(maxlen=1)
        self.wake = threading.Event()
        self.stop = threading.Event()
        self.drain = threading.Event()
        self.rest = threading.Event()  # of an engine that shares its device: not its turn
        self.failure: BaseException | None = None
        self.totals = RolloutTotals()

    @property
    def running(self) -> bool:
        """Neither stopped nor broken."""
        return not self.stop.is_set() and self.failure is None

    def guard(self, loop: Callable[[], None]) -> None:
        """Run a loop; its failure ends the actor instead of being lost in a thread."""
        try:
            loop()
        except BaseException as error:
            self.failure = self.failure or error
            self.wake.set()

    def hold(self, leases: Iterable[RequestLease]) -> list[RequestLease]:
        """Note leases; returns those whose group is not under way already."""
        leases = list(leases)
        with self._held_lock:
            new = [lease for lease in leases if lease.request.key not in self.held]
            self.held.update((lease.request.key, lease) for lease in leases)
        return new

    def take_back(self, lease: RequestLease) -> RequestLease:
        """The newest lease of the same request, no longer held."""
        with self._held_lock:
            return self.held.pop(lease.request.key, lease)

    def settle(self, key: str, tokens: int | None) -> None:
        """A group has left the actor's hands. ``tokens`` were generated for it; None when it was
        not delivered."""
        with self._held_lock:
            self.held.pop(key, None)
        if tokens is not None:
            self.totals.tokens += tokens
            self.totals.groups += 1

    def clear(self) -> list[RequestLease]:
        """Forget all groups and weights; returns the leases that were held. Only between runs."""
        held = list(self.held.values())
        self.held.clear()
        self.ready.clear()
        self.working.clear()
        self.incoming.clear()
        return held
