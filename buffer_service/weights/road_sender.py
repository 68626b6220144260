"""Rank 0's choice of the road for each version: to the group of members at once, or over the board.

One transfer that fails costs one new group and is made again. Where no group can be formed the
version takes the board, which is said."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from avatar_rl.buffer_service.weights.links import PartSource, SenderLink
from avatar_rl.buffer_service.weights.news import Call, Noticeboard, Sealed
from avatar_rl.buffer_service.weights.transfer_client import TransferClient

log = logging.getLogger(__name__)

#: What of a version is streamed next, by all ranks: tensors that never change, those that do, or
#: all of them for the board.
Pass: TypeAlias = Literal["fixed", "changing", "board"]
PASSES: tuple[Pass, ...] = ("fixed", "changing", "board")
Parts: TypeAlias = Iterable[Mapping[str, Tensor]]

CALL_S = 2.0  # for an answer of those that gave a sign of life lately
ATTEMPTS = 2  # to form a group and to send; the second is the re-formation after a death
REST = 8  # versions that take the board without another try, after no group could be formed


class BoardSender(Protocol):
    """``WeightSender``."""

    dtype: torch.dtype

    def publish(self, version: int, parts: Parts) -> int: ...


OpenLink: TypeAlias = Callable[[TransferClient, PartSource], SenderLink]


@dataclass
class RoadStats:
    """Since this sender began."""

    members: int = 0  # that hold the last version
    formations: int = 0  # groups that were formed
    fallbacks: int = 0  # versions that took the board though members were there


class RoadSender:
    """Decides and sends. ``passes`` says what is streamed next, ``send`` takes it.

    Args:
        board: Where sender and members talk; there may be no members.
        sender: The weight store's.
        layout: Parts by pass, tensors on the meta device by published name.
        open_link: Meets a group that was called together.
        board_every: A version whose number it divides is on the board, too.
        last: Number of the last version, which is always on the board.
        on_phase: Hears of every step.
        on_fallback: Hears of a version that took the board though members were there, and why.
    """

    def __init__(
        self,
        board: Noticeboard,
        sender: BoardSender,
        layout: Mapping[Pass, Sequence[Mapping[str, Tensor]]],
        open_link: OpenLink,
        *,
        board_every: int = 1,
        last: int = 0,
        on_phase: Callable[[str], None] = lambda phase: None,
        on_fallback: Callable[[int, str], None] = lambda version, why: None,
    ) -> None:
        self.board, self.sender, self.layout = board, sender, layout
        self.board_every, self.last = board_every, last
        self.on_phase, self.on_fallback = on_phase, on_fallback
        self.stats = RoadStats()
        self._open = open_link
        self._client = TransferClient(board, on_phase)
        self._sources = {kind: PartSource(layout[kind], sender.dtype) for kind in PASSES[:2]}
        self._source = PartSource([], sender.dtype)  # what the link sends
        self._link: SenderLink | None = None
        self._fixed: set[str] = set()  # members that hold the fixed tensors
        self._rest = 0
        self._version, self._failure = 0, ""

    def passes(self, version: int) -> Generator[Pass, None, None]:
        """What all ranks stream for ``version``, one after another, each taken by ``send``.

        At the end the version is sealed, and may be committed."""
        self._version, self._failure = version, ""
        members: set[str] = set()
        for attempt in range(ATTEMPTS):
            if not self._meet(again=attempt > 0):
                break
            group = set(self._client.ranks)
            if self.layout["fixed"] and not group <= self._fixed:
                yield "fixed"
                if self._link is None:
                    continue
                self._fixed |= group
            yield "changing"
            if self._link is not None:
                members = group
                break
        missed = self.board.members() - members
        if missed and not members:
            self._say_fallback(version)
        if missed or not members or version % self.board_every == 0 or version == self.last:
            yield "board"
        token = self._client.token if members else uuid.uuid4().hex
        self.stats.members = len(members)
        self.board.seal(Sealed(version, token, sorted(members)))
        self.on_phase("sealed")

    def send(self, kind: Pass, parts: Iterator[Mapping[str, Tensor]]) -> None:
        """Take the tensors of a pass. What fails on the way to the group is noted for ``passes``.
        Raises ModelError where the board takes them not."""
        if kind == "board":
            self.sender.publish(self._version, parts)
            return
        assert self._link is not None
        self._source.layout = self._sources[kind].layout
        self._source.feed(parts)
        self._client.begin_transfer(self._version, fixed=kind == "fixed")
        self.on_phase("sending")
        try:
            self._link.send_weights()
        except Exception as error:  # links raise anything; the group is then of no use
            self._drop(f"version {self._version}: {error}")

    def close(self) -> None:
        """Leave the group."""
        if self._link is not None:
            self._drop("the sender ends")
        self.board.close()

    def _meet(self, *, again: bool) -> bool:
        """A group of all that are there; the one that is formed already, if they are its own."""
        there = self.board.members()
        if self._link is not None and there != set(self._client.ranks):
            self._drop(f"members came or went: {len(self._client.ranks)} -> {len(there)}")
        if self._link is not None:
            return True
        if self._rest > 0 and not again:
            self._rest -= 1
            return False
        for _ in range(ATTEMPTS):
            if not (here := self._call(there)):
                return False
            self._client.begin_group(here)
            try:
                self._link = self._open(self._client, self._source)
            except Exception as error:  # of NCCL, gloo, sockets
                self._failure = f"no group of {len(here)} could be formed: {error}"
                log.warning("weights: %s", self._failure)
                self._client.give_up()
                there = self.board.members()
                continue
            self.stats.formations += 1
            self.on_phase("formed")
            return True
        self._rest = REST
        return False

    def _call(self, there: set[str]) -> set[str]:
        """Those that answer a call; at once when all of ``there`` have."""
        if not there:
            return set()
        self.on_phase("calling")
        self.board.listen()
        number = self.board.next_number()
        self.board.tell(Call(number))
        here: set[str] = set()
        end = time.monotonic() + CALL_S
        while not there <= here and time.monotonic() < end:
            here |= {
                answer.member
                for answer in self.board.answers(end - time.monotonic())
                if (answer.what, answer.to) == ("here", str(number))
            }
            there &= self.board.members() | here
        self.board.bury(there - here)  # who lives shows itself again
        return here

    def _drop(self, why: str) -> None:
        """Give the group up."""
        log.info("weights: the group is given up: %s", why)
        self._failure = why
        self._client.give_up()
        assert self._link is not None
        self._link.shutdown()
        self._link = None

    def _say_fallback(self, version: int) -> None:
        self.stats.fallbacks += 1
        why = self._failure or "no member answered"
        log.warning("version %d takes the board: %s", version, why)
        self.on_fallback(version, why)
