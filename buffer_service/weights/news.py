"""What sender and members of a transfer tell one another, in Redis: who is there, which group is
formed, which transfer begins, what came of it.

Tensors travel elsewhere (links.py). A stream carries the sender's news to all, another the members'
answers back. What is sealed is a single value, so whoever joins late can read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import msgspec
from redis.client import Pipeline

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.connection import Connection

#: A member that is silent for so long is taken for dead; its sign of life comes far more often.
ALIVE_S = 4.0
BEAT_S = 0.5
#: News and answers that are kept: all read them within seconds.
KEEP_NEWS, KEEP_ANSWERS = 16, 4096


class Call(msgspec.Struct, frozen=True, tag=True):
    """Who is there? Members answer ``here``."""

    number: int


class Form(msgspec.Struct, frozen=True, tag=True):
    """A group of these members meets now; the sender has rank 0. Members answer ``joined``."""

    epoch: int
    ranks: dict[str, int]
    how: bytes  # what the link needs to meet


class Send(msgspec.Struct, frozen=True, tag=True):
    """A piece of a transfer is on its way to the group. Members answer ``received``.

    ``fixed``: its tensors never change, and belong to every version from now on."""

    epoch: int
    token: str  # of this transfer
    piece: int  # from 0; most links send all in one
    version: int
    fixed: bool
    what: bytes  # what the link needs to receive

    @property
    def name(self) -> str:
        """What members answer to."""
        return f"{self.token}/{self.piece}"


class Sent(msgspec.Struct, frozen=True, tag=True):
    """All of a transfer is out. Members that hold it whole answer ``staged``."""

    token: str
    checksums: list[int]  # of its parts, empty where the link has none


class Dropped(msgspec.Struct, frozen=True, tag=True):
    """The group is given up: leave it, and forget what came of a transfer under way."""

    epoch: int


class Sealed(msgspec.Struct, frozen=True, tag=True):
    """What will be committed as ``version``, and who holds it; others take it from the board."""

    version: int
    token: str
    members: list[str]


News: TypeAlias = Call | Form | Send | Sent | Dropped | Sealed


class Answer(msgspec.Struct, frozen=True):
    """A member's answer: ``to`` is the number, epoch or token that it answers."""

    member: str
    what: str  # here | joined | received | staged | failed
    to: str
    why: str = ""  # of what failed


_NEWS, _ANSWER = msgspec.msgpack.Decoder(News), msgspec.msgpack.Decoder(Answer)
_SEALED = msgspec.msgpack.Decoder(Sealed)


class _Stream:
    """Reads a stream from where it stands when this is made."""

    def __init__(self, connection: Connection, key: str) -> None:
        self._connection, self._key = connection, connection.key(key)
        newest = connection.attempt(
            lambda: connection.client.xrevrange(self._key, count=1)  # [(id, fields)]
        )
        self._last: bytes = newest[0][0] if newest else b"0-0"

    def read(self, wait_s: float) -> Iterator[bytes]:
        """What came since, waited for up to ``wait_s``."""
        block = max(1, int(1000 * wait_s))
        found = self._connection.attempt(
            lambda: self._connection.client.xread({self._key: self._last}, block=block)
        )
        for _, entries in found or ():
            for number, fields in entries:
                self._last = number
                yield fields[b"m"]


class Noticeboard:
    """One process's view of the news of a run; one thread uses it."""

    def __init__(self, config: BufferConfig, run_id: str, url: str) -> None:
        self._connection = Connection(config, run_id, url)
        self._news: _Stream | None = None
        self._answers: _Stream | None = None

    # -- the sender's side -------------------------------------------------------------------------

    def tell(self, news: News) -> None:
        """To all members."""
        self._add("road:news", msgspec.msgpack.encode(news), KEEP_NEWS)

    def seal(self, sealed: Sealed) -> None:
        """Say what will be committed; before the commit, and once the members hold it."""
        key, value = self._connection.key("road"), msgspec.msgpack.encode(sealed)
        self._connection.attempt(lambda: self._connection.client.hset(key, "sealed", value))
        self.tell(sealed)

    def members(self) -> set[str]:
        """Those that gave a sign of life lately."""
        key = self._connection.key("road:members")
        names = [
            name.decode()
            for name in self._connection.attempt(lambda: self._connection.client.hkeys(key))
        ]

        def look(pipe: Pipeline) -> None:
            for name in names:
                pipe.exists(self._alive(name))

        alive = self._connection.together(look)
        dead = [name for name, there in zip(names, alive, strict=True) if not there]
        if dead:
            self._connection.attempt(lambda: self._connection.client.hdel(key, *dead))
        return set(names) - set(dead)

    def next_number(self) -> int:
        """For a call or an epoch; never the same twice in a run."""
        key = self._connection.key("road")
        return int(
            self._connection.attempt(lambda: self._connection.client.hincrby(key, "number", 1))
        )

    def listen(self) -> None:
        """Answers count from now on."""
        self._answers = _Stream(self._connection, "road:answers")

    def answers(self, wait_s: float) -> list[Answer]:
        """New answers, waited for up to ``wait_s``."""
        if self._answers is None:
            self.listen()
        assert self._answers is not None
        return [_ANSWER.decode(data) for data in self._answers.read(wait_s)]

    def forget(self, actor: str) -> None:
        """The members of an actor that is known to have ended are dead."""
        key = self._connection.key("road:members")
        names = self._connection.attempt(lambda: self._connection.client.hkeys(key))
        self.bury({name.decode() for name in names if name.decode().rpartition("/")[0] == actor})

    def bury(self, members: set[str]) -> None:
        """These are dead until they give another sign of life."""
        if members:
            key = self._connection.key("road:members")
            alive = [self._alive(member) for member in members]
            self._connection.attempt(lambda: self._connection.client.hdel(key, *members))
            self._connection.attempt(lambda: self._connection.client.unlink(*alive))

    # -- the members' side -------------------------------------------------------------------------

    def beat(self, member: str) -> None:
        """A sign of life."""
        key, alive = self._connection.key("road:members"), self._alive(member)

        def beat(pipe: Pipeline) -> None:
            pipe.hset(key, member, "")
            pipe.set(alive, b"", px=int(1000 * ALIVE_S))

        self._connection.together(beat)

    def leave(self, member: str) -> None:
        """No more signs of life will come."""
        self.bury({member})

    def news(self, wait_s: float) -> list[News]:
        """What the sender told since the last call, or since the first; waited for up to
        ``wait_s``."""
        if self._news is None:
            self._news = _Stream(self._connection, "road:news")
        return [_NEWS.decode(data) for data in self._news.read(wait_s)]

    def answer(self, answer: Answer) -> None:
        """To the sender."""
        self._add("road:answers", msgspec.msgpack.encode(answer), KEEP_ANSWERS)

    def sealed(self) -> Sealed | None:
        """What was sealed last."""
        key = self._connection.key("road")
        found = self._connection.attempt(lambda: self._connection.client.hget(key, "sealed"))
        return None if found is None else _SEALED.decode(found)

    def close(self) -> None:
        self._connection.close()

    def _alive(self, member: str) -> str:
        return self._connection.key(f"road:alive:{member}")

    def _add(self, name: str, data: bytes, keep: int) -> None:
        key = self._connection.key(name)
        self._connection.attempt(
            lambda: self._connection.client.xadd(key, {"m": data}, maxlen=keep, approximate=False)
        )
