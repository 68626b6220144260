"""The short way to Redis for what is asked most: commands packed by hand, replies read by hand.

redis-py opens the connections (login, TLS, timeouts, typed errors). What is left out is its work
per command: about 40 us of bookkeeping, and two copies of every value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis
from redis.connection import DefaultParser

Word = bytes | str | int | float
Meanwhile = Callable[[], None] | None
_AHEAD = 2  # commands that Redis may have before it has answered the first
_SPARE = 4  # a buffer that grew beyond this many times its size is given back


def words(args: Iterable[Word]) -> list[bytes]:
    """RESP bulk strings of ``args``; text as UTF-8, numbers as Python writes them."""
    data = [arg if type(arg) is bytes else str(arg).encode() for arg in args]
    return [b"$%d\r\n%b\r\n" % (len(word), word) for word in data]


def pack(*args: Word) -> bytes:
    """One command as RESP."""
    return b"".join((b"*%d\r\n" % len(args), *words(args)))


def pack_keys(command: str, start: str, names: Sequence[str]) -> bytes:
    """One command over many keys, ``start`` + name each."""
    head = start.encode()
    size = len(head)
    keys = [b"$%d\r\n%b%b\r\n" % (size + len(name), head, name) for name in map(str.encode, names)]
    return b"".join((b"*%d\r\n" % (1 + len(keys)), *words((command,)), *keys))


class ReplyReader:
    """Reads RESP2 replies: a parser class as redis-py's ``Connection`` takes it. Bulk strings are
    ``bytes``."""

    def __init__(self, socket_read_size: int) -> None:
        self._size = socket_read_size
        self._sock: Any = None
        self._reset()

    def _reset(self) -> None:
        self._data = bytearray(self._size)
        self._view = memoryview(self._data)
        self._at = self._end = 0  # what was received and not yet used

    def on_connect(self, connection: Any) -> None:
        """A new socket: forgets what was read of the old one."""
        self._sock = connection._sock
        self._at = self._end = 0

    def on_disconnect(self) -> None:
        """The socket is gone."""
        self._sock = None

    def read_response(self, disable_decoding: bool = False, **_: Any) -> Any:
        """The next reply; an error Redis answered is returned, not raised, unless the connection is
        of no use then."""
        reply = self._reply()
        if self._at == self._end:
            if len(self._data) > _SPARE * self._size:
                self._reset()
            self._at = self._end = 0
        return reply

    def _receive(self) -> None:
        if self._sock is None:
            raise redis.exceptions.ConnectionError("the connection is closed")
        if self._end == len(self._data):
            rest = self._view[self._at : self._end]
            if self._at == 0:
                self._data = bytearray(2 * self._end)
            self._data[: len(rest)] = rest
            self._view = memoryview(self._data)
            self._at, self._end = 0, len(rest)
        n = self._sock.recv_into(self._view[self._end :])
        if n == 0:
            raise redis.exceptions.ConnectionError("Redis closed the connection")
        self._end += n

    def _reply(self) -> Any:
        while (stop := self._data.find(b"\r\n", self._at, self._end)) < 0:
            self._receive()
        kind, line = self._data[self._at], self._data[self._at + 1 : stop]
        self._at = stop + 2
        if kind == 0x24:  # $
            return self._bulk(int(line))
        if kind == 0x3A:  # :
            return int(line)
        if kind == 0x2A:  # *
            return self._array(int(line))
        if kind == 0x2B:  # +
            return bytes(line)
        if kind == 0x2D:  # -
            error = DefaultParser.parse_error(line.decode(errors="replace"))
            if isinstance(error, redis.exceptions.ConnectionError):
                raise error
            return error
        raise redis.exceptions.InvalidResponse(
            f"Redis sent {chr(kind)!r}, which begins no RESP2 reply"
        )

    def _bulk(self, size: int) -> bytes | None:
        if size < 0:
            return None
        while self._end - self._at < size + 2:
            self._receive()
        at = self._at
        self._at = at + size + 2
        return bytes(self._view[at : at + size])

    def _array(self, size: int) -> list[Any] | None:
        if size < 0:
            return None
        items: list[Any] = []
        for _ in range(size):
            # A bulk string that is here already, without the calls: most of a draw.
            data, at = self._data, self._at
            stop = data.find(b"\r\n", at, self._end)
            if stop > 0 and data[at] == 0x24:
                first = stop + 2
                last = first + int(data[at + 1 : stop])
                if first <= last <= self._end - 2:
                    items.append(bytes(self._view[first:last]))
                    self._at = last + 2
                    continue
            items.append(self._reply())
        return items


class Wire:
    """Connections that carry one command at a time. Thread-safe: each call takes an idle one, or
    opens one."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._idle: list[Any] = []  # append and pop are atomic

    def ask(self, packed: bytes, meanwhile: Meanwhile = None) -> Any:
        """The reply to one packed command; ``meanwhile`` runs while it is awaited. Raises what
        redis-py raises."""
        replies: list[Any] = []
        self.each((packed,), replies.append, meanwhile)
        return replies[0]

    def each(
        self, commands: Sequence[bytes], take: Callable[[Any], None], meanwhile: Meanwhile = None
    ) -> None:
        """Sends packed commands and hands each reply to ``take`` while Redis works on the next: two
        are under way at a time, for Redis answers none before it has worked through all that it has
        read."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._pool.make_connection()
        try:
            connection.send_packed_command(commands[:_AHEAD], check_health=False)
            if meanwhile is not None:
                meanwhile()
            for sent in range(_AHEAD, len(commands) + _AHEAD):
                reply = connection.read_response(disable_decoding=True)
                if sent < len(commands):
                    connection.send_packed_command((commands[sent],), check_health=False)
                take(reply)
        except BaseException as error:
            if not isinstance(error, redis.exceptions.ResponseError) or len(commands) > 1:
                connection.disconnect()  # replies, or half of one, may be left in it
            if isinstance(error, redis.exceptions.ConnectionError):
                self.close()  # the others are as dead
            raise
        finally:
            self._idle.append(connection)

    def close(self) -> None:
        """Closes what is idle; a later call opens it again."""
        while self._idle:
            try:
                self._idle.pop().disconnect()
            except IndexError:
                return
