"""Coverage-guided fuzzing of the record codec; not collected by pytest. Needs ``pip install
atheris``.

``python -m tests.chaos.fuzz_codec -max_total_time=600``. A crash file named by it is replayed by
giving its path."""

from __future__ import annotations

import struct
import sys

import atheris

with atheris.instrument_imports(include=["avatar_rl.buffer_service"]):
    from avatar_rl.buffer_service.errors import RecordError
    from avatar_rl.buffer_service.records.codec import FORMAT, MAGIC, checksum, decode, encode
    from avatar_rl.buffer_service.records.trajectory import Trajectory


def seal(data: bytes) -> bytes:
    """A record with a right head and checksum around ``data``, so that the fields behind them are
    reached."""
    tokens = min(data[0] % 8, (len(data) - 1) // 8) if data else 0
    fields = data[1 : len(data) - 8 * tokens]
    body = fields + bytes(-len(fields) % 4) + data[len(data) - 8 * tokens :]
    return struct.pack("<4sHHIII", MAGIC, FORMAT, 0, len(fields), tokens, checksum(body)) + body


def check(record: bytes) -> None:
    """Either a RecordError, or a trajectory that survives the way out and back."""
    try:
        found: Trajectory = decode(record)
    except RecordError:
        return
    assert found.token_ids.shape == found.logprobs.shape and found.version == found.versions[0][0]
    again = encode(found)
    assert encode(decode(again)) == again  # by bytes, for NaN differs from itself


def one_input(data: bytes) -> None:
    check(data)
    if data:
        check(seal(data))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
