"""A member of the transfers: a process that takes versions into its own memory beside a running
engine (a worker of vLLM), and hands one over once it is committed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.weights.links import MemberLink
from avatar_rl.buffer_service.weights.news import (
    BEAT_S,
    Answer,
    Call,
    Dropped,
    Form,
    News,
    Noticeboard,
    Send,
    Sent,
)
from avatar_rl.buffer_service.weights.staging import Staging
from avatar_rl.common.errors import AvatarError

log = logging.getLogger(__name__)

WAIT_S = 0.5  # for news, between looks at whether to end
KEPT = 2  # versions: the one that the engine may still ask for, and the next

Pairs = Iterable[tuple[str, Tensor]]


def _as_it_is(pairs: Pairs) -> Pairs:
    return pairs


def _nothing(phase: str) -> None:
    pass


@dataclass(frozen=True)
class MemberSettings:
    """All that a member needs to know; plain data."""

    name: str  # its actor's, a slash, its number among the actor's workers
    buffer: BufferConfig
    run_id: str
    redis_url: str


@dataclass(eq=False)
class _Staged:
    """A version that is held, with the memory that goes back once it was taken."""

    version: int
    token: str
    pairs: Pairs
    memory: Tensor | None


@dataclass
class _Transfer:
    """What is being received."""

    send: Send
    checksums: list[int] = field(default_factory=list)


class Member:
    """Follows the news in a thread of its own, from ``start`` to ``close``.

    ``check`` makes of the pairs of a whole version what the engine takes, or raises ModelError.
    ``on_phase`` hears of every step.
    """

    def __init__(
        self,
        settings: MemberSettings,
        staging: Staging,
        link: MemberLink,
        *,
        check: Callable[[Pairs], Pairs] = _as_it_is,
        on_phase: Callable[[str], None] = _nothing,
    ) -> None:
        self.settings, self.staging, self.link = settings, staging, link
        self.check, self.on_phase = check, on_phase
        self._epoch = 0  # of the group that it is in; 0: in none
        self._fixed: dict[str, Tensor] = {}  # tensors of every version
        self._transfer: _Transfer | None = None
        self._staged: list[_Staged] = []
        self._reserved: _Staged | None = None
        self._holds = threading.Lock()  # of the two above
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=loop, name=f"weights-{name}", daemon=True)
            for name, loop in (("member", self._follow), ("beat", self._beat))
        ]

    def start(self) -> None:
        """Be a member from now on."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Leave. A receive under way is broken off."""
        self._stop.set()
        self.link.shutdown()
        for thread in self._threads:
            thread.join(2 * WAIT_S)

    def reserve(self, version: int, token: str) -> bool:
        """Keep this version for ``load``, whatever comes; whether it is held."""
        with self._holds:
            found = [s for s in self._staged if (s.version, s.token) == (version, token)]
            if not found:
                return False
            self._staged.remove(found[0])
            before, self._reserved = self._reserved, found[0]
        if before is not None:
            self._give_back([before])
        return True

    def load(self, into: Callable[[Pairs], None]) -> None:
        """Hand the reserved version to the engine; then it and all before it are forgotten."""
        with self._holds:
            reserved, self._reserved = self._reserved, None
        assert reserved is not None
        self.on_phase("adopting")
        into(reserved.pairs)
        with self._holds:
            old = [s for s in self._staged if s.version <= reserved.version]
            self._staged = [s for s in self._staged if s.version > reserved.version]
        self._give_back([reserved, *old])

    def _give_back(self, staged: Iterable[_Staged]) -> None:
        for one in staged:
            one.pairs = ()
            self.staging.give_back(one.memory)

    # -- the two threads ---------------------------------------------------------------------------

    def _beat(self) -> None:
        board = self._board()
        while True:
            try:
                board.beat(self.settings.name)
            except AvatarError as error:
                log.warning("no sign of life of %s: %s", self.settings.name, error)
            if self._stop.wait(BEAT_S):
                break
        try:
            board.leave(self.settings.name)
        except AvatarError as error:
            log.info("%s left without a word: %s", self.settings.name, error)
        board.close()

    def _follow(self) -> None:
        board = self._board()
        while not self._stop.is_set():
            try:
                news = board.news(WAIT_S)
            except AvatarError as error:
                log.warning("no news of weights: %s", error)
                self._stop.wait(WAIT_S)
                continue
            for one in _of_today(news):
                self._heed(one, board)
        self._leave()
        board.close()

    def _board(self) -> Noticeboard:
        given = self.settings
        return Noticeboard(given.buffer, given.run_id, given.redis_url)

    # -- what the sender says ----------------------------------------------------------------------

    def _heed(self, news: News, board: Noticeboard) -> None:
        name = self.settings.name
        if isinstance(news, Call):
            self.on_phase("called")
            board.answer(Answer(name, "here", str(news.number)))
        elif isinstance(news, Form):
            self._leave()
            if name in news.ranks:
                self._answering(board, "joined", str(news.epoch), lambda: self._join(news))
        elif isinstance(news, Send) and news.epoch == self._epoch:
            self._answering(board, "received", news.name, lambda: self._receive(news))
        elif isinstance(news, Sent) and self._transfer and self._transfer.send.token == news.token:
            transfer = self._transfer
            self._answering(board, "staged", news.token, lambda: self._stage(transfer, news))
        elif isinstance(news, Dropped) and news.epoch == self._epoch:
            self._leave()

    def _answering(
        self, board: Noticeboard, what: str, to: str, action: Callable[[], None]
    ) -> None:
        """Answer that ``action`` went well, or why it did not; then the group is left."""
        try:
            action()
        except Exception as error:  # links raise anything; the sender has to know
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
            log.warning("%s is not %s: %s", self.settings.name, what, why)
            self._leave()
            board.answer(Answer(self.settings.name, "failed", to, why))
        else:
            board.answer(Answer(self.settings.name, what, to))
            self.on_phase(what)

    def _join(self, news: Form) -> None:
        self.on_phase("forming")
        self.link.meet(news.how, news.ranks[self.settings.name])
        self._epoch = news.epoch

    def _receive(self, news: Send) -> None:
        self.on_phase("receiving")
        if self._transfer is None or self._transfer.send.token != news.token:
            self.staging.discard()
            self._transfer = _Transfer(news)
        self._transfer.checksums += self.link.receive(news.what, news.piece)

    def _stage(self, transfer: _Transfer, news: Sent) -> None:
        """Check what came and hold it. Raises ModelError."""
        self._transfer = None
        if transfer.checksums != news.checksums:
            self.staging.discard()
            raise AvatarError("the bytes are not those that were sent (checksum differs)")
        tensors, memory = self.staging.taken()
        if transfer.send.fixed:
            self._fixed = tensors
            return
        self.on_phase("checking")
        try:
            whole: Mapping[str, Tensor] = self._fixed | tensors
            pairs = self.check(whole.items())
        except BaseException:
            self.staging.give_back(memory)
            raise
        version = transfer.send.version
        with self._holds:
            # One of the same number came from a learner that died before its commit.
            old = [s for s in self._staged if s.version == version]
            rest = [s for s in self._staged if s.version != version]
            rest.append(_Staged(version, news.token, pairs, memory))
            rest.sort(key=lambda staged: staged.version)
            self._staged = rest[-KEPT:]
        self._give_back([*old, *rest[:-KEPT]])

    def _leave(self) -> None:
        """Out of the group; what was not received whole is forgotten."""
        self._epoch, self._transfer = 0, None
        self.link.shutdown()
        self.staging.discard()


def _of_today(news: list[News]) -> list[News]:
    """Without what a later group has made pointless, and calls that nobody waits for any more."""
    last = max((i for i, one in enumerate(news) if isinstance(one, Form | Dropped)), default=0)
    return news[last:]
