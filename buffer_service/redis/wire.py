"""The short way to Redis for what is asked most: packed commands on connections of redis-py.

redis-py opens the connections (login, TLS, timeouts, typed errors) and hiredis reads and writes
them. What is left out is redis-py's bookkeeping per command, about 40 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import hiredis
import redis
from redis.connection import ConnectionInterface

Word = bytes | str | int | float
Reply: TypeAlias = Any  # bytes, int, None or a list of these, as the command says
Meanwhile = Callable[[], None] | None
_AHEAD = 2  # commands that Redis may have before it has answered the first


def pack(*args: Word) -> bytes:
    """One command as it goes over the wire."""
    return bytes(hiredis.pack_command(args))  # type: ignore[arg-type]  # its stub wants one word


class Wire:
    """Connections that carry one command at a time. Thread-safe: each call takes an idle one, or
    opens one."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._idle: list[ConnectionInterface] = []  # append and pop are atomic

    def ask(self, packed: bytes, meanwhile: Meanwhile = None) -> Reply:
        """The reply to one packed command; ``meanwhile`` runs while it is awaited. Raises what
        redis-py raises."""
        replies: list[Reply] = []
        self.each((packed,), replies.append, meanwhile)
        return replies[0]

    def each(
        self, commands: Sequence[bytes], take: Callable[[Reply], None], meanwhile: Meanwhile = None
    ) -> None:
        """Sends packed commands and hands each reply to ``take`` while Redis works on the next.

        Two are under way at a time, for Redis answers none before it has worked through all that
        it has read. A call that fails half way closes its connection.
        """
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
