"""Record format, validation, configuration and the draw's random numbers: no Redis."""

from __future__ import annotations

import itertools
import struct
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from avatar_rl.buffer_service.config import BufferConfig, TierShares
from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.codec import FORMAT, checksum, decode, encode
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.buffer_service.records.trajectory import Trajectory
from avatar_rl.buffer_service.records.validate import check_group, is_success, zero_accuracy
from avatar_rl.buffer_service.replay import seed_state
from avatar_rl.common.errors import ConfigError
from tests.buffer_records import make_group
from tests.reference_buffer import generator

#: Fields that are no part of format 2's.
LATER = ("token_ids", "logprobs", "details", "experts")
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def experts(draw: st.DrawFn, tokens: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    kind = draw(st.sampled_from([np.uint8, np.uint16]))
    shape = (tokens, draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    count = int(np.prod(shape))
    numbers = draw(st.lists(st.integers(0, 255), min_size=count, max_size=count))
    return np.array(numbers, kind).reshape(shape)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40))
    logprobs = draw(
        st.lists(st.floats(-100, 0, width=32), min_size=len(tokens), max_size=len(tokens))
    )
    return Trajectory(
        id=draw(st.text(max_size=20)),
        group_id=draw(st.text(max_size=20)),
        prompt_id=draw(st.text(max_size=40)),
        index=draw(st.integers(0, 64)),
        hinted=draw(st.booleans()),
        prompt_tokens=draw(st.integers(0, 10**6)),
        prompt_digest=draw(st.integers(0, 2**32 - 1)),
        token_ids=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        versions=tuple(
            draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3))
        ),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        temperature=draw(finite),
        reward=draw(finite),
        components=draw(st.dictionaries(st.text(max_size=9), st.none() | finite, max_size=4)),
        step=draw(st.integers(0, 10**6)),
        details=draw(st.dictionaries(st.text(max_size=9), finite, max_size=3)),
        experts=draw(st.none() | experts(len(tokens) - 1)),
    )


@settings(max_examples=40, deadline=None)
@given(trajectories())
def test_round_trip_is_exact(t: Trajectory) -> None:
    back = decode(encode(t))
    for name in t.__struct_fields__:
        a, b = getattr(t, name), getattr(back, name)
        assert (
            (np.array_equal(a, b) and a.dtype == b.dtype) if isinstance(a, np.ndarray) else a == b
        )
    assert back.version == t.versions[0][0]


@settings(max_examples=40, deadline=None)
@given(trajectories(), st.data())
def test_any_damage_is_noticed(t: Trajectory, data: st.DataObject) -> None:
    good = bytearray(encode(t))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RecordError):
        decode(bytes(good))


@settings(max_examples=40, deadline=None)
@given(trajectories(), st.integers(0, 10**4))
def test_truncated_and_extended_records_are_refused(t: Trajectory, cut: int) -> None:
    good = encode(t)
    for bad in (good[: cut % len(good)], good + b"\0"):
        with pytest.raises(RecordError):
            decode(bad)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_a_typed_error(noise: bytes) -> None:
    with pytest.raises(RecordError):
        decode(noise)
    body = noise + bytes(-len(noise) % 4)  # a valid frame around nonsense fields
    head = struct.pack("<4sHHIII", b"AVTR", FORMAT, 0, len(noise), 0, checksum(body))
    with pytest.raises(RecordError, match=r"fields unreadable|no policy version"):
        decode(head + body)


def test_text_that_is_no_utf8_is_a_typed_error() -> None:
    """Found by tests/chaos/fuzz_codec.py: msgpack says UnicodeDecodeError, which is not its own
    DecodeError."""
    fields = bytes([0x9D, 0xA5]) + b"0000\xff"
    body = fields + bytes(-len(fields) % 4)
    with pytest.raises(RecordError, match="fields unreadable"):
        decode(struct.pack("<4sHHIII", b"AVTR", FORMAT, 0, len(fields), 0, checksum(body)) + body)


def test_what_msgpack_cannot_hold_is_a_typed_error() -> None:
    t = make_group(lease(), [1.0]).trajectories[0]
    for changes in ({"prompt_id": "\ud800"}, {"prompt_tokens": 2**64}):
        with pytest.raises(
            RecordError, match=r"00000003\.0.*; give UTF-8 text and integers of 64 bits"
        ):
            encode(msgspec.structs.replace(t, **changes))


def of_before(t: Trajectory, version: int) -> bytes:
    """The record as format ``version``, 1 or 2, had it."""
    values = [getattr(t, name) for name in t.__struct_fields__ if name not in LATER]
    fields = msgspec.msgpack.encode(values)
    body = fields + bytes(-len(fields) % 4) + t.token_ids.tobytes() + t.logprobs.tobytes()
    found = checksum(body, version)
    return struct.pack("<4sHHIII", b"AVTR", version, 0, len(fields), len(t.token_ids), found) + body


def test_a_record_of_the_format_before_has_no_details() -> None:
    t = make_group(lease(), [1.0]).trajectories[0]
    back = decode(of_before(t, 2))
    assert back.details == {} and (back.id, back.step) == (t.id, t.step)


def test_every_bit_of_a_head_counts() -> None:
    """The checksum does not cover the head: format 2 is one bit away from 3."""
    good = encode(make_group(lease(), [1.0]).trajectories[0])
    for bit in range(8 * 20):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            decode(bytes(bad))


def lease(seq: int = 3, kind: str = "train") -> RequestLease:
    request = RolloutRequest(seq=seq, prompt_id="p", step=0, n=2)
    return RequestLease(request=request, attempt=1, consumer="c", hinted=False)


def test_newer_format_names_both_formats() -> None:
    data = bytearray(encode(make_group(lease(), [1.0]).trajectories[0]))
    struct.pack_into("<H", data, 4, FORMAT + 1)
    with pytest.raises(
        RecordError, match=f"x.1: record format {FORMAT + 1}, this code reads 1 to {FORMAT}"
    ):
        decode(bytes(data), "x.1")


def test_records_of_format_1_are_read_and_their_checksum_is_a_crc32() -> None:
    t = make_group(lease(), [1.0]).trajectories[0]
    data = bytearray(of_before(t, 2))
    struct.pack_into("<H", data, 4, 1)
    with pytest.raises(RecordError, match="checksum does not match"):
        decode(bytes(data), "x.1")
    struct.pack_into("<I", data, 16, zlib.crc32(data[20:]))
    assert data == of_before(t, 1)
    back = decode(bytes(data))
    assert back.id == t.id and np.array_equal(back.logprobs, t.logprobs)


def test_arrays_are_read_only_views_of_the_record() -> None:
    data = encode(make_group(lease(), [1.0], tokens=1000).trajectories[0])
    t = decode(data)
    assert len(data) <= 12_288
    for array in (t.token_ids, t.logprobs):
        assert not array.flags.owndata and not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(data, np.uint8))


def test_layout_of_the_arrays_is_little_endian() -> None:
    t = make_group(lease(), [1.0]).trajectories[0]
    data = encode(t)
    n = len(t.token_ids)
    assert struct.unpack(f"<{n}i", data[-8 * n : -4 * n]) == tuple(t.token_ids.tolist())
    assert struct.unpack(f"<{n}f", data[-4 * n :]) == tuple(t.logprobs.tolist())


def test_valid_group_passes_and_order_matters() -> None:
    group = make_group(lease(), [1.0, 0.0])
    check_group(group)
    with pytest.raises(RecordError, match="position 0"):
        check_group(msgspec.structs.replace(group, trajectories=group.trajectories[::-1]))
    with pytest.raises(RecordError, match="asks for id 00000004"):
        check_group(msgspec.structs.replace(group, seq=4))
    with pytest.raises(RecordError, match="no trajectory"):
        check_group(msgspec.structs.replace(group, trajectories=()))


def test_success_and_zero_accuracy_use_the_component_unless_masked() -> None:
    scored = make_group(lease(), [0.0, 0.6])
    masked = make_group(lease(), [0.0, 0.6], accuracy=False)
    assert [is_success(t, "accuracy", 0.5) for t in scored.trajectories] == [False, True]
    assert [is_success(t, "accuracy", 0.5) for t in masked.trajectories] == [False, True]
    assert [
        zero_accuracy(g, "accuracy") for g in (scored, masked, make_group(lease(), [0.0, 0.0]))
    ] == [0, -1, 1]


def test_generator_equals_lecuyers_published_recurrence() -> None:
    # CACM 31(6), 1988, figure 3, written with Schrage's method on integers as printed there.
    s1, s2 = seed_state(12, 34)
    below = generator(12, 34)
    for n in itertools.islice(itertools.cycle([2, 7, 1000, 2**20]), 400):
        k = s1 // 53668
        s1 = 40014 * (s1 - k * 53668) - k * 12211
        s1 += 2147483563 if s1 < 0 else 0
        k = s2 // 52774
        s2 = 40692 * (s2 - k * 52774) - k * 3791
        s2 += 2147483399 if s2 < 0 else 0
        z = s1 - s2
        z += 2147483562 if z < 1 else 0
        assert below(n) == (z % 2147483562) * n // 2147483562


def test_neighbouring_seeds_are_unrelated() -> None:
    firsts = [generator(seed, step)(1000) for seed in range(40) for step in range(40)]
    assert len(set(firsts)) > 700 and abs(np.mean(firsts) - 499.5) < 25


def test_config_refuses_what_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="sum to"):
        TierShares(easy=0.5, medium=0.5, hard=0.5)
    with pytest.raises(ValueError, match="must be below"):
        BufferConfig(quantile_low=0.8)
    with pytest.raises(ValueError, match="extra"):
        BufferConfig.model_validate({"capcity": 3})
    monkeypatch.delenv("NO_SUCH_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_PASSWORD is not set"):
        BufferConfig(password_env="NO_SUCH_PASSWORD").password()
    monkeypatch.setenv("SOME_PASSWORD", "s3cret")
    secret = BufferConfig(password_env="SOME_PASSWORD").password()
    assert (
        secret is not None
        and "s3cret" not in repr(secret)
        and secret.get_secret_value() == "s3cret"
    )


@pytest.mark.parametrize("capacity", [4, 7, 100, 10_000, 9_999])
def test_tier_capacities_add_up(capacity: int) -> None:
    easy, medium, hard = BufferConfig(capacity=capacity, warm_up=0).capacities()
    assert (
        easy + medium + hard == capacity and easy <= 0.25 * capacity and medium <= 0.35 * capacity
    )
    if capacity == 10_000:
        assert (easy, medium, hard) == (2500, 3500, 4000)


def test_every_config_field_is_described() -> None:
    for name, field in BufferConfig.model_fields.items():
        assert field.description, name
