"""Binary form of a trajectory: fixed head, msgpack fields, then the raw little-endian arrays. No
pickle.

0  magic "AVTR"   4  format u16   6  zero u16   8  length of the fields u32
12  T u32   16  checksum of the rest u32
20 fields (msgpack array, zero-padded to 4 bytes), token ids int32[T], log-probabilities float32[T]
then in format 4 the experts, (T - 1, layers, k) of one or two bytes each, as its last field says

The checksum is the low half of XXH3-64 (eight times as fast as CRC-32). A record without experts is
of format 3. Format 2 had no details, format 1 a CRC-32 besides; both can still be read."""

from __future__ import annotations

import struct
import zlib

import msgspec
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.trajectory import Trajectory

MAGIC = b"AVTR"
FORMAT = 4  # the newest; written where there are experts, else the one before
_HEAD = struct.Struct("<4sHHIII")
_SIZE = _HEAD.size
_unpack = _HEAD.unpack_from
_PADDING = (b"", bytes(1), bytes(2), bytes(3))


class _Fields(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """The fields of a ``Trajectory`` but its arrays, in their stored order."""

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
    details: dict[str, float] = {}


class _FieldsOfFour(_Fields, array_like=True, forbid_unknown_fields=True, gc=False, kw_only=True):
    """With the layers, k and bytes of a number of the experts."""

    experts: tuple[int, int, int]


#: How the fields begin in msgpack: an array of so many.
_BEGINS = {1: 0x90 + 13, 2: 0x90 + 13, 3: 0x90 + 14, 4: 0x90 + 15}
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Fields).decode
_decode_four = msgspec.msgpack.Decoder(_FieldsOfFour).decode
_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")
_SHORT, _LONG = np.dtype("<u1"), np.dtype("<u2")  # of an expert's number, of one or two bytes
_array = np.frombuffer


def checksum(body: bytes | memoryview, version: int = FORMAT) -> int:
    """32-bit checksum of what follows the head, as format ``version`` has it."""
    return xxh3_64_intdigest(body) & 0xFFFFFFFF if version != 1 else zlib.crc32(body)


def encode(t: Trajectory) -> bytes:
    """Bytes of one trajectory (about 8 T + 200, and its experts). Raises RecordError for what
    msgpack cannot hold."""
    try:
        fields = _encode(_fields(t))
    except (OverflowError, UnicodeEncodeError) as error:
        raise RecordError(
            f"trajectory {t.id!r}: {error}; give UTF-8 text and integers of 64 bits"
        ) from error
    tokens = np.asarray(t.token_ids, _INT).tobytes()
    logprobs = np.asarray(t.logprobs, _FLOAT).tobytes()
    parts = [fields, _PADDING[-len(fields) % 4], tokens, logprobs]
    version = FORMAT - 1
    if t.experts is not None:
        version = FORMAT
        parts.append(np.asarray(t.experts, _SHORT if t.experts.itemsize == 1 else _LONG).tobytes())
    body = b"".join(parts)
    return _HEAD.pack(MAGIC, version, 0, len(fields), len(tokens) // 4, checksum(body)) + body


def _fields(t: Trajectory) -> _Fields:
    fields = _Fields(
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
        t.details,
    )
    if t.experts is None:
        return fields
    _, layers, k = t.experts.shape
    return _FieldsOfFour(*msgspec.structs.astuple(fields), experts=(layers, k, t.experts.itemsize))


def decode(data: bytes | memoryview, name: str = "?") -> Trajectory:
    """The trajectory in ``data``; its arrays are read-only views of ``data``.

    Raises RecordError naming ``name`` when the record is foreign, newer than this code, truncated
    or corrupt."""
    size = len(data)
    if size < _SIZE:
        raise RecordError(
            f"trajectory {name}: not such a record ({size} bytes); did another program write it?"
        )
    magic, version, zero, length, tokens, expected = _unpack(data)
    if magic != MAGIC:
        raise RecordError(
            f"trajectory {name}: not such a record ({size} bytes); did another program write it?"
        )
    if not 1 <= version <= FORMAT or zero:
        raise RecordError(
            f"trajectory {name}: record format {version}, this code reads 1 to {FORMAT}; use its "
            "release"
        )
    end = _SIZE + length
    at = end + (-length % 4)
    if size != at + 8 * tokens if version < FORMAT else size < at + 8 * tokens:
        raise RecordError(
            f"trajectory {name}: {size} bytes, its head says {at + 8 * tokens}; it is damaged"
        )
    if checksum(memoryview(data)[_SIZE:], version) != expected:
        raise RecordError(
            f"trajectory {name}: checksum does not match; remove it or restore a snapshot"
        )
    try:
        fields = (_decode if version < FORMAT else _decode_four)(data[_SIZE:end])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError included
        raise RecordError(
            f"trajectory {name}: fields unreadable ({error}); the record is corrupt"
        ) from error
    if data[_SIZE] != _BEGINS[version]:  # the checksum does not cover the head
        raise RecordError(
            f"trajectory {name}: record format {version}, its fields are of another; it is damaged"
        )
    if not fields.versions:
        raise RecordError(f"trajectory {name}: no policy version; the record is corrupt")
    return Trajectory(
        id=fields.id,
        group_id=fields.group_id,
        prompt_id=fields.prompt_id,
        index=fields.index,
        hinted=fields.hinted,
        prompt_tokens=fields.prompt_tokens,
        prompt_digest=fields.prompt_digest,
        token_ids=_array(data, _INT, tokens, at),
        logprobs=_array(data, _FLOAT, tokens, at + 4 * tokens),
        versions=fields.versions,
        finish_reason=fields.finish_reason,
        temperature=fields.temperature,
        reward=fields.reward,
        components=fields.components,
        step=fields.step,
        details=fields.details,
        experts=_experts(fields, data, tokens, at + 8 * tokens, name),
    )


def _experts(
    fields: _Fields, data: bytes | memoryview, tokens: int, at: int, name: str
) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
    """The experts that begin at byte ``at``; None of a record without."""
    if not isinstance(fields, _FieldsOfFour):
        return None
    layers, k, size = fields.experts
    count = max(0, tokens - 1) * layers * k
    if size not in (1, 2) or min(layers, k) < 1 or len(data) != at + count * size:
        raise RecordError(
            f"trajectory {name}: {len(data) - at} bytes of experts for {tokens} tokens, {layers} "
            f"layers, {k} each; it is damaged"
        )
    shape = (tokens - 1, layers, k)
    if size == 1:
        return _array(data, _SHORT, count, at).reshape(shape)
    return _array(data, _LONG, count, at).reshape(shape)
