"""The weight store: where the learner leaves a policy version and rollout actors pull it from
(docs/architecture.md).

Learner and rollout actors never call each other; both know only this actor. Tensors travel through
the Ray object store (one transfer per node); the weight store holds the references."""

from __future__ import annotations

import asyncio
from pickle import PickleBuffer
from typing import Any


def hand_over(source: Any, taken: int) -> tuple[Any, tuple[int, int]]:
    """Runs inside the publishing actor, whose ``outbox`` answers once it has something to give."""
    return source.outbox.hand_over(taken)


class WeightStore:
    """Plain class; the cluster makes it an asynchronous Ray actor. Keeps the newest ``keep``
    versions alive.

    What an actor *returns* belongs to its caller, so the weight store has a standing call with the
    publisher, which returns with the next version: its bytes are copied once, into the publisher's
    own node, and outlive the publisher. Who waits for a version waits for that call's result, and
    hears of it from Ray without a line of Python in between."""

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self.versions: dict[
            int, list[Any]
        ] = {}  # a reference in a list, so that Ray hands on no value
        self._source: Any = None
        self._coming: list[Any] | None = None  # what the standing call will return
        self._following: asyncio.Task[None] | None = None  # or the loop would forget the task
        self._news = asyncio.Event()

    def publish(self, message: Any) -> None:
        """Keep a ``WeightMessage`` of somebody who is no actor: copied into an object of our own,
        since his dies with him."""
        import ray

        version, manifest, checksum, block = message
        if not self._stale(version):
            self._keep(version, ray.put((version, manifest, checksum, PickleBuffer(block))))

    async def follow(self, source: list[Any]) -> None:
        """Take what the actor ``source[0]`` publishes from now on, until it dies or another is
        followed.

        To ask again for one that is followed already does nothing.
        """
        if self._source == source[0]:
            return
        self._source = source[0]
        self._following = asyncio.get_running_loop().create_task(self._follow(source[0]))

    async def _follow(self, source: Any) -> None:
        import ray

        taken = 0
        try:
            while self._source is source:
                message, told = source.__ray_call__.options(num_returns=2).remote(hand_over, taken)
                self._coming = [message]
                self._tell()
                taken, version = await told  # says that it went well, without fetching the tensors
                if self._source is source and not self._stale(version):
                    self._keep(version, message)
        except ray.exceptions.RayError:
            pass  # it died; its successor will ask to be followed
        finally:
            if self._source is source:
                self._source = self._coming = None

    def latest(self, newer_than: int) -> tuple[int, list[Any]] | None:
        """The newest version above ``newer_than`` and its reference, or None."""
        newest = max(self.versions, default=-1)
        return (newest, self.versions[newest]) if newest > newer_than else None

    def lost(self, version: int) -> bool:
        """Nothing as new as ``version`` is here, and nobody is there to publish it: this weight
        store is not the first one."""
        return self._source is None and self.latest(version - 1) is None

    async def newer(self, newer_than: int, wait_s: float) -> list[Any] | None:
        """The reference of the newest version above ``newer_than``, or of the one to come, which
        may never do.

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

    def _keep(self, version: int, reference: Any) -> None:
        self.versions[version] = [reference]
        for old in sorted(self.versions)[: -self.keep]:
            del self.versions[old]
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
