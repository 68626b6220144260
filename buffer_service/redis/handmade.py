"""RESP by hand: commands packed and replies read in Python, without redis-py's copies.

The alternative to hiredis in wire.py; `make bench NAME=buffer` reports both.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Protocol

import redis
from redis.connection import DefaultParser

from avatar_rl.buffer_service.redis.wire import Reply, Resp, Word

_SPARE = 4  # a buffer that grew beyond this many times its size is given back


def _bulk_strings(args: Iterable[Word]) -> list[bytes]:
    data = [arg if type(arg) is bytes else str(arg).encode() for arg in args]
    return [b"$%d\r\n%b\r\n" % (len(word), word) for word in data]


def pack(*args: Word) -> bytes:
    """One command as RESP; text as UTF-8, numbers as Python writes them."""
    return b"".join((b"*%d\r\n" % len(args), *_bulk_strings(args)))


class _Connected(Protocol):
    _sock: socket.socket


class ReplyReader:
    """Reads RESP2 replies: a parser class as redis-py's ``Connection`` takes it. Bulk strings are
    ``bytes``."""

    def __init__(self, socket_read_size: int) -> None:
        self._size = socket_read_size
        self._sock: socket.socket | None = None
        self._reset()

    def _reset(self) -> None:
        self._data = bytearray(self._size)
        self._view = memoryview(self._data)
        self._at = self._end = 0  # what was received and not yet used

    def on_connect(self, connection: _Connected) -> None:
        """A new socket: forgets what was read of the old one."""
        self._sock = connection._sock
        self._at = self._end = 0

    def on_disconnect(self) -> None:
        """The socket is gone."""
        self._sock = None

    def read_response(self, disable_decoding: bool = False, timeout: float | None = None) -> Reply:
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

    def _reply(self) -> Reply:
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

    def _array(self, size: int) -> list[Reply] | None:
        if size < 0:
            return None
        items: list[Reply] = []
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


HANDMADE = Resp(pack=pack, options={"parser_class": ReplyReader})
