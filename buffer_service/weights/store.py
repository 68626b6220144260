"""The weight store: where the learner leaves a policy version and rollout actors pull it from
(docs/architecture.md).

Learner and rollout actors never call each other; both know only this actor. Tensors travel through
the Ray object store (one transfer per node); the weight store holds the references. It computes
nothing, so this module imports no torch."""

from __future__ import annotations

import asyncio
from pickle import PickleBuffer
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle
    from typing_extensions import Buffer

#: Shape of every tensor and its type as torch names it without the prefix ("bfloat16").
Manifest: TypeAlias = dict[str, tuple[tuple[int, ...], str]]


class WeightMessage(NamedTuple):
    """A version as it travels.

    ``block`` is one bare buffer, a ``PickleBuffer``, which Ray copies once: hundreds of objects
    took longer than 10 MB of weights.
    """

    version: int
    manifest: Manifest
    checksum: int  # XXH3 of the block, 64 bits: as fast as memory; against damage, not malice
    block: Buffer  # the tensors in the manifest's order, each from a multiple of ``ALIGN`` bytes on


#: A message's reference in a list: Ray would replace a bare one by its value.
MessageRef: TypeAlias = "list[ray.ObjectRef[WeightMessage]]"
#: What the standing call returns: the message, and (its number, its version).
HandOver: TypeAlias = tuple[WeightMessage, tuple[int, int]]


class MessageSource(Protocol):
    """The side of an ``Outbox`` that the weight store calls."""

    def hand_over(self, taken: int) -> HandOver: ...


class Publisher(Protocol):
    """An actor that publishes."""

    @property
    def outbox(self) -> MessageSource: ...


def hand_over(publisher: Publisher, taken: int) -> HandOver:
    """Runs inside the publishing actor; its ``outbox`` answers once it has something to give."""
    return publisher.outbox.hand_over(taken)


class WeightStore:
    """Plain class; the cluster makes it an asynchronous Ray actor. Keeps the newest ``keep``
    versions alive.

    What an actor *returns* belongs to its caller. So the weight store has a standing call with the
    publisher, which returns with the next version: its bytes are copied once, into the publisher's
    own node, and outlive the publisher. A rollout actor waits for that call's result. Ray itself
    tells it, without a line of Python in between."""

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self.versions: dict[int, MessageRef] = {}
        self._publisher: ActorHandle | None = None
        self._coming: MessageRef | None = None  # what the standing call will return
        self._following: asyncio.Task[None] | None = None  # or the loop would forget the task
        self._news = asyncio.Event()

    def publish(self, message: WeightMessage) -> None:
        """Keep a version of a process that is no actor, as an object of our own: the caller's would
        die with the caller."""
        import ray

        if not self._stale(message.version):
            whole = message._replace(block=PickleBuffer(message.block))
            self._keep(message.version, ray.put(whole))

    async def follow(self, publisher: list[ActorHandle]) -> None:
        """Take what the actor ``publisher[0]`` publishes from now on, until it dies or another is
        followed.

        To ask again for one that is followed already does nothing.
        """
        if self._publisher == publisher[0]:
            return
        self._publisher = publisher[0]
        self._following = asyncio.get_running_loop().create_task(self._follow(publisher[0]))

    async def _follow(self, publisher: ActorHandle) -> None:
        import ray

        message: ray.ObjectRef[WeightMessage]
        told: ray.ObjectRef[tuple[int, int]]
        taken = 0
        try:
            while self._publisher is publisher:
                message, told = publisher.__ray_call__.options(num_returns=2).remote(
                    hand_over, taken
                )
                self._coming = [message]
                self._tell()
                taken, version = await told  # says that it went well, without fetching the tensors
                if self._publisher is publisher and not self._stale(version):
                    self._keep(version, message)
        except ray.exceptions.RayError:
            pass  # it died; its successor will ask to be followed
        finally:
            if self._publisher is publisher:
                self._publisher = self._coming = None

    def latest(self, newer_than: int) -> tuple[int, MessageRef] | None:
        """The newest version above ``newer_than`` and its reference, or None."""
        newest = max(self.versions, default=-1)
        return (newest, self.versions[newest]) if newest > newer_than else None

    def lost(self, version: int) -> bool:
        """Nothing as new as ``version`` is here and nobody publishes: this weight store was
        restarted and has lost what it held."""
        return self._publisher is None and self.latest(version - 1) is None

    async def newer(self, newer_than: int, wait_s: float) -> MessageRef | None:
        """The reference of the newest version above ``newer_than``, or of the next one, which may
        never come.

        None when nobody is there to publish one within ``wait_s`` seconds.
        """
        found = self.latest(newer_than)
        if found is None and self._coming is None:
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except TimeoutError:
                return None
            found = self.latest(newer_than)
        return found[1] if found is not None else self._coming

    def _stale(self, version: int) -> bool:
        """From a learner that was declared dead: versions only grow."""
        return bool(self.versions) and version < max(self.versions)

    def _keep(self, version: int, reference: ray.ObjectRef[WeightMessage]) -> None:
        self.versions[version] = [reference]
        for old in sorted(self.versions)[: -self.keep]:
            del self.versions[old]
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
