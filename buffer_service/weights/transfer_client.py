"""The sender's way of driving a transfer's members: the four calls of vLLM's weight-sync client,
over the noticeboard."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from avatar_rl.buffer_service.weights.news import Dropped, Form, Noticeboard, Send, Sent
from avatar_rl.common.errors import ModelError

#: Seconds that members may take to meet, to receive a piece, and to check what they hold.
FORM_S, RECEIVE_S, STAGE_S = 60.0, 300.0, 300.0
WAIT_S = 0.2  # between looks at who is alive


class TransferError(ModelError):
    """A transfer did not reach all of its group."""


def _nothing(phase: str) -> None:
    pass


class TransferClient:
    """Drives one group; a link (links.py) calls its methods, some of them from another thread while
    it sends. ``on_phase`` hears of every step."""

    def __init__(self, board: Noticeboard, on_phase: Callable[[str], None] = _nothing) -> None:
        self.board, self.on_phase = board, on_phase
        self.epoch = 0
        self.ranks: dict[str, int] = {}  # of the group's members, from 1
        self.version, self.fixed, self.token = 0, False, ""
        self.checksums: list[int] = []  # of the parts of the transfer, if the link takes them
        self.failed: dict[str, str] = {}  # member: why, of the group that is given up
        self._piece = 0
        self._given_up = threading.Event()
        self._turn = threading.RLock()  # the noticeboard's

    def begin_group(self, members: set[str]) -> None:
        """The members of the group that is formed next."""
        with self._turn:
            self.epoch = self.board.next_number()
            self.ranks = {name: rank for rank, name in enumerate(sorted(members), 1)}
            self.failed = {}
            self._given_up.clear()
            self.board.listen()

    def begin_transfer(self, version: int, *, fixed: bool) -> None:
        """What ``send_weights`` of the link will send."""
        self.version, self.fixed = version, fixed

    def give_up(self) -> None:
        """Whoever waits for the group waits no longer; its members leave it."""
        self._given_up.set()
        with self._turn:
            self.board.tell(Dropped(self.epoch))

    # -- what a link calls -------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """The members meet; returns when all have. Raises TransferError."""
        with self._turn:
            self.on_phase("forming")
            how = msgspec.msgpack.encode(init_info)
            self.board.tell(Form(self.epoch, self.ranks, how))
            self._await("joined", str(self.epoch), FORM_S)

    def start_weight_update(self) -> None:
        """A transfer begins."""
        self.token, self._piece, self.checksums = uuid.uuid4().hex, 0, []

    def update_weights(self, update_info: Any) -> None:
        """The members receive what the link sends beside this call, which returns when all have.
        Raises TransferError."""
        with self._turn:
            what = msgspec.msgpack.encode(update_info)
            send = Send(self.epoch, self.token, self._piece, self.version, self.fixed, what)
            self._piece += 1
            self.board.tell(send)
            self._await("received", send.name, RECEIVE_S)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The members check and keep what they received; returns when all have. Raises
        TransferError."""
        with self._turn:
            self.on_phase("sent")
            self.board.tell(Sent(self.token, self.checksums))
            self._await("staged", self.token, STAGE_S)
            self.on_phase("staged")

    def shutdown_weight_transfer_engine(self) -> None:
        """The members leave the group."""
        self.give_up()

    def _await(self, what: str, to: str, limit_s: float) -> None:
        """Every member has answered ``what`` to ``to``. Raises TransferError naming those that
        failed, died, or were silent for ``limit_s``."""
        waiting, end = set(self.ranks), time.monotonic() + limit_s
        looked = time.monotonic()
        while waiting and not self._given_up.is_set():
            for answer in self.board.answers(WAIT_S):
                if answer.to != to or answer.member not in waiting:
                    continue
                if answer.what == what:
                    waiting.discard(answer.member)
                elif answer.what == "failed":
                    self.failed[answer.member] = answer.why
            now = time.monotonic()
            if waiting and now > looked + WAIT_S:
                looked, alive = now, self.board.members()
                self.failed |= {name: "it died" for name in waiting - alive}
            if now > end:
                self.failed |= {name: f"silent for {limit_s:g} s" for name in waiting}
            if self.failed:
                break
        if self._given_up.is_set():
            raise TransferError("the group was given up")
        if self.failed:
            why = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.failed.items()))
            raise TransferError(f"not {what} by all of the group: {why}")
