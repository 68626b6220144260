"""Packing of commands and reading of replies by hand: no Redis, a socket pair."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from avatar_rl.buffer_service.redis.handmade import HANDMADE, ReplyReader
from avatar_rl.buffer_service.redis.wire import HIREDIS, Word

BIG = bytes(range(256)) * 40
REPLIES: list[tuple[bytes, Any]] = [
    (b"+OK\r\n", b"OK"),
    (b":-12\r\n", -12),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"*0\r\n", []),
    (b"$0\r\n\r\n", b""),
    (b"$6\r\n\r\n$3\r\n\r\n", b"\r\n$3\r\n"),  # a value that looks like a reply
    (b"*4\r\n$2\r\nab\r\n$-1\r\n*2\r\n:1\r\n$1\r\nx\r\n$0\r\n\r\n", [b"ab", None, [1, b"x"], b""]),
    (b"*2\r\n$%d\r\n%b\r\n$1\r\ny\r\n" % (len(BIG), BIG), [BIG, b"y"]),
]


class Line:
    """A reader on one end of a socket pair, as redis-py's connection sets it up."""

    def __init__(self, size: int = 64) -> None:
        self._sock, self.far = socket.socketpair()
        self.reader = ReplyReader(size)
        self.reader.on_connect(self)

    def close(self) -> None:
        self._sock.close()
        self.far.close()


@pytest.fixture
def line() -> Iterator[Line]:
    opened = Line()
    yield opened
    opened.close()


@pytest.mark.parametrize("step", [1, 2, 7, 63, 64, 65, 100_000])
def test_replies_are_the_same_however_they_are_cut(line: Line, step: int) -> None:
    sent = b"".join(raw for raw, _ in REPLIES)

    def send() -> None:
        for i in range(0, len(sent), step):
            line.far.sendall(sent[i : i + step])

    sender = threading.Thread(target=send)
    sender.start()
    for _, expected in REPLIES:
        assert line.reader.read_response() == expected
    sender.join()


def test_values_outlive_the_buffer_and_a_grown_buffer_is_given_back(line: Line) -> None:
    line.far.sendall(b"*1\r\n$%d\r\n%b\r\n" % (len(BIG), BIG))
    [value] = line.reader.read_response()
    assert len(line.reader._data) == 64
    line.far.sendall(b"$60\r\n%b\r\n" % (b"z" * 60))
    assert line.reader.read_response() == b"z" * 60 and value == BIG


def test_errors_are_typed_and_those_inside_a_reply_are_returned(line: Line) -> None:
    line.far.sendall(
        b"-NOSCRIPT no such script\r\n*2\r\n:1\r\n-ERR AVATAR_HELD x\r\n-LOADING wait\r\n?\r\n"
    )
    assert isinstance(line.reader.read_response(), redis.exceptions.NoScriptError)
    one, error = line.reader.read_response()
    assert (
        one == 1
        and isinstance(error, redis.exceptions.ResponseError)
        and "AVATAR_HELD" in str(error)
    )
    with pytest.raises(redis.exceptions.BusyLoadingError):
        line.reader.read_response()
    with pytest.raises(redis.exceptions.InvalidResponse, match=r"'\?'"):
        line.reader.read_response()


def test_a_reply_that_breaks_off_is_a_connection_error(line: Line) -> None:
    line.far.sendall(b"*2\r\n$4\r\nab")
    line.far.close()
    with pytest.raises(redis.exceptions.ConnectionError, match="closed the connection"):
        line.reader.read_response()
    line.reader.on_disconnect()
    with pytest.raises(redis.exceptions.ConnectionError, match="is closed"):
        line.reader.read_response()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.binary(max_size=9000) | st.text() | st.integers() | st.floats(), min_size=1, max_size=6
    )
)
def test_commands_are_packed_as_hiredis_packs_them(args: list[Word]) -> None:
    assert HANDMADE.pack("GET", *args) == HIREDIS.pack("GET", *args)
