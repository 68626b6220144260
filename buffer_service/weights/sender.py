"""Weights out: a trained version becomes visible to rollout actors through the weight store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from avatar_rl.buffer_service.weights.block import DTYPES, WeightBlock
from avatar_rl.buffer_service.weights.store import HandOver, WeightMessage
from avatar_rl.common.errors import ModelError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

TAKE_S = 600.0  # one copy within a machine; this long only when the object store has to spill
#: A weight store that has not taken a version by then may be a new one, which follows nobody yet.
ASK_S = 5.0


class Outbox:
    """Of the actor that publishes, under the name ``outbox``; one version at a time is on its way
    to the weight store.

    The actor needs one thread (max_concurrency) more than calls that may publish at once: the
    standing call waits in it, and copies the tensors into the object store while the learner
    continues."""

    def __init__(self, weight_store: ActorHandle) -> None:
        self.weight_store = weight_store
        self._changed = threading.Condition()
        self._offered: WeightMessage | None = None
        self._serial = 0  # number of the last message that was put
        self._taken = 0  # number of the last message that the weight store has
        # The standing call is the newest one: a new weight store may ask while that of its
        # predecessor still waits.
        self._call = 0
        self._followed = False

    def await_taken(self) -> None:
        """Returns once the weight store has the last message, at once where there was none.

        Raises ModelError when it does not take it.
        """
        deadline = time.monotonic() + TAKE_S
        while not self._await_taken(ASK_S):
            if time.monotonic() > deadline:
                version = self._offered.version if self._offered else 0
                raise ModelError(
                    f"the weight store did not take version {version} within {TAKE_S:g} s"
                )
            self._ask_to_follow()

    def put(self, message: WeightMessage) -> None:
        """Offer ``message`` to the weight store, after ``await_taken``.

        It is taken while the caller continues. Leave its memory alone until the message after it
        was taken: a new weight store may ask for this one again.
        """
        with self._changed:
            self._offered = message
            self._serial += 1
            self._changed.notify_all()
        if not self._followed:
            self._ask_to_follow()

    def put_again(self) -> int:
        """Offer the last message to a weight store that was restarted; its version, 0 where there
        is none."""
        if self._offered is None:
            return 0
        self._ask_to_follow()
        return self._offered.version

    def _ask_to_follow(self) -> None:
        import ray

        ray.get(self.weight_store.follow.remote([ray.get_runtime_context().current_actor]))
        self._followed = True

    def _await_taken(self, wait_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._taken >= self._serial, wait_s)

    def hand_over(self, taken: int) -> HandOver:
        """The weight store's standing call: it has message number ``taken``, and this returns the
        next one as soon as there is one. Raises ModelError when another weight store has asked
        meanwhile."""
        with self._changed:
            self._call += 1
            call, self._taken = self._call, taken
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._serial > taken or self._call != call)
            if self._call != call or self._offered is None:
                raise ModelError("another weight store took over")
            return self._offered, (self._serial, self._offered.version)


class WeightSender:
    """Casts, copies, checksums and hands over one full set of weights per version. Runs on rank 0.

    ``layout``: tensors like those that will be published, on the meta device, by their published
    names.
    """

    def __init__(self, layout: Mapping[str, Tensor], outbox: Outbox, *, dtype: str) -> None:
        self.layout = layout
        self.outbox = outbox
        self.dtype = DTYPES[dtype]
        # Two: one to write to, and one that the weight store may still read, or read again.
        self._blocks: list[WeightBlock] = []
        self._turn = threading.Lock()

    def publish(self, version: int, parts: Iterable[Mapping[str, Tensor]]) -> int:
        """Offer ``version`` to the weight store and return its bytes. ``parts`` are published
        tensors, all of them in any portions. They may be the parameters themselves: they are copied
        here, and may change as soon as this returns.

        Raises ModelError when tensors are missing or unknown, or the weight store does not take the
        version before.
        """
        with self._turn:
            self.outbox.await_taken()  # so nobody reads the version before the last
            block, left = self._other_block(), set(self.layout)
            for part in parts:
                if strangers := part.keys() - left:
                    raise ModelError(
                        f"version {version}: {min(strangers)!r} is not in the published "
                        "checkpoint, or comes twice"
                    )
                block.fill(part)
                left -= part.keys()
            if left:
                raise ModelError(
                    f"version {version} lacks {len(left)} tensors, first {min(left)!r}"
                )
            self.outbox.put(block.message(version))
        return block.nbytes

    def put_again(self) -> int:
        """Offer the last published version to a weight store that lost it; its number, 0 where
        there is none."""
        return self.outbox.put_again()

    def _other_block(self) -> WeightBlock:
        """The block that was not filled last."""
        if len(self._blocks) < 2:
            self._blocks.append(WeightBlock(self.layout, self.dtype))
        else:
            self._blocks.reverse()
        return self._blocks[-1]
