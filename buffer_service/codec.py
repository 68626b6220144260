"""Binary form of a trajectory: fixed head, msgpack fields, then the raw little-endian arrays. No pickle.

0  magic "AVTR"   4  format u16   6  zero u16   8  length of the fields u32   12  T u32   16  crc32 of the rest u32
20 fields (msgpack array, zero-padded to 4 bytes), token ids int32[T], log-probabilities float32[T]
"""

from __future__ import annotations

import struct
import zlib

import msgspec
import numpy as np

from buffer_service.errors import RecordError
from buffer_service.trajectory import Trajectory

MAGIC = b"AVTR"
FORMAT = 1
_HEAD = struct.Struct("<4sHHIII")


class _Fields(msgspec.Struct, frozen=True, array_like=True):
    id: str
    group_id: str
    prompt_id: str
    index: int
    hinted: bool
    prompt_tokens: int
    prompt_digest: int
    versions: tuple[tuple[int, int], ...]
    finish_reason: str
    temperature: float
    reward: float
    components: dict[str, float | None]
    step: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Fields)


def encode(t: Trajectory) -> bytes:
    """Bytes of one trajectory (about 8 T + 200)."""
    fields = _encoder.encode(
        _Fields(
            t.id,
            t.group_id,
            t.prompt_id,
            t.index,
            t.hinted,
            t.prompt_tokens,
            t.prompt_digest,
            t.versions,
            t.finish_reason,
            float(t.temperature),
            float(t.reward),
            t.components,
            t.step,
        )
    )
    padding = bytes(-len(fields) % 4)
    tokens = np.ascontiguousarray(t.token_ids, dtype="<i4")
    logprobs = np.ascontiguousarray(t.logprobs, dtype="<f4")
    body = b"".join((fields, padding, tokens.tobytes(), logprobs.tobytes()))
    return _HEAD.pack(MAGIC, FORMAT, 0, len(fields), len(tokens), zlib.crc32(body)) + body


def decode(data: bytes | memoryview, name: str = "?") -> Trajectory:
    """The trajectory in ``data``; its arrays are read-only views of ``data``.

    Raises RecordError naming ``name`` when the record is foreign, newer than this code, truncated or corrupt.
    """
    if len(data) < _HEAD.size or data[:4] != MAGIC:
        raise RecordError(f"trajectory {name}: not such a record ({len(data)} bytes); did another program write it?")
    _, version, zero, length, tokens, crc = _HEAD.unpack_from(data)
    if version != FORMAT or zero:
        raise RecordError(f"trajectory {name}: record format {version}, this code reads {FORMAT}; use its release")
    at = _HEAD.size + length + (-length % 4)
    if len(data) != at + 8 * tokens:
        raise RecordError(f"trajectory {name}: {len(data)} bytes, its head says {at + 8 * tokens}; it is damaged")
    body = memoryview(data)[_HEAD.size :]
    if zlib.crc32(body) != crc:
        raise RecordError(f"trajectory {name}: checksum does not match; remove it or restore a snapshot")
    try:
        f = _decoder.decode(body[:length])
    except msgspec.DecodeError as error:  # ValidationError included
        raise RecordError(f"trajectory {name}: fields unreadable ({error}); the record is corrupt") from error
    if not f.versions:
        raise RecordError(f"trajectory {name}: no policy version; the record is corrupt")
    return Trajectory(
        id=f.id,
        group_id=f.group_id,
        prompt_id=f.prompt_id,
        index=f.index,
        hinted=f.hinted,
        prompt_tokens=f.prompt_tokens,
        prompt_digest=f.prompt_digest,
        token_ids=np.frombuffer(data, "<i4", tokens, at),
        logprobs=np.frombuffer(data, "<f4", tokens, at + 4 * tokens),
        versions=f.versions,
        finish_reason=f.finish_reason,
        temperature=f.temperature,
        reward=f.reward,
        components=f.components,
        step=f.step,
    )
