"""Whether a media file is whole: what its container promises against the bytes that are there.

Players show what is left of a file that was cut short, and so would we: a shorter clip under the
same question. Containers that state their length give the cut away; streams that state none (0 or
the largest number, as live encoders write) are read to their end."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from avatar_rl.common.errors import InputError

_SPARE_BYTES = 64  # padding and trailers that writers forget to count
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_UNSTATED = (0, 0x7FFFFFFF, 0xFFFFFFFF)
_UNSTATED_WAV = (0x7FFFF000, 0xFFFFF000)  # streamed WAV files round these down to whole blocks


def check_whole(path: Path) -> None:
    """Raises InputError when the container says that more should follow than the file holds."""
    size = path.stat().st_size
    with path.open("rb") as file:
        promised = _promised(file, size)
    if promised is not None and promised > size + _SPARE_BYTES:
        raise InputError(
            path,
            f"is cut short: {size} bytes of the {promised} that its header promises",
            "copy or download the file again, or drop the row",
        )


def _promised(file: BinaryIO, size: int) -> int | None:
    """Bytes that the file should have; None where its format does not say."""
    head = file.read(12)
    if head[:4] == b"RIFF":
        return _riff(file, head, size)
    for magic, reader in _STATED.items():
        if head.startswith(magic):
            return reader(file, size)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"styp"):
        return _boxes(file, size)
    if head[:4] == _EBML:
        return _matroska(file)
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return _mpeg_audio(file)
    return None


def _riff(file: BinaryIO, head: bytes, size: int) -> int | None:
    """WAV and AVI: the end of the chunk with the samples, else what the file's head says."""
    if head[8:12] not in (b"WAVE", b"AVI "):
        return None
    stated = int.from_bytes(head[4:8], "little")
    if head[8:12] == b"AVI ":
        return None if stated in _UNSTATED else stated + 8
    at = 12
    while at + 8 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            unstated = length in _UNSTATED or length & 0xFFFFF000 in _UNSTATED_WAV
            return None if unstated else at + 8 + length
        at += 8 + length + length % 2
    return None


def wav_states_no_length(path: Path) -> bool:
    """A WAV file whose length stands at 0 or the largest number: written as a stream."""
    with path.open("rb") as file:
        head = file.read(12)
        size = path.stat().st_size
        is_wav = head[:4] == b"RIFF" and head[8:12] == b"WAVE"
        return is_wav and _riff(file, head, size) is None and file.tell() < size


def _boxes(file: BinaryIO, size: int) -> int:
    """MP4 and MOV: where the last of the outermost boxes ends."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length, name = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length == 0:  # to the end of the file
            return size
        if length < 8 or not name.isascii():
            return size  # no box: whatever follows the last one
        at += length
    return at


def _matroska(file: BinaryIO) -> int | None:
    """Matroska and WebM: where the segment ends, unless it was written live."""
    file.seek(4)
    header = _vint(file)
    if header is None:
        return None
    file.seek(header, 1)
    if file.read(4) != _SEGMENT:
        return None
    length = _vint(file)
    return None if length is None else file.tell() + length


def _vint(file: BinaryIO) -> int | None:
    """A variable-length number of EBML; None for "unknown" and for a damaged one."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    width = 9 - first[0].bit_length()
    value = int.from_bytes(
        bytes([first[0] & ((1 << (8 - width)) - 1)]) + file.read(width - 1), "big"
    )
    return None if value == (1 << (7 * width)) - 1 else value


def _mpeg_audio(file: BinaryIO) -> int | None:
    """MP3: what the Xing or Info header of its first frame counts."""
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3":
        start = 10 + sum(
            byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)
        )
    file.seek(start)
    frame = file.read(512)
    for at in _places(frame, (b"Xing", b"Info")):
        flags = int.from_bytes(frame[at + 4 : at + 8], "big")
        if flags & 2:  # the count of bytes is there, behind that of frames where that is there
            place = at + (12 if flags & 1 else 8)
            return start + int.from_bytes(frame[place : place + 4], "big")
    return None


def _places(data: bytes, marks: tuple[bytes, ...]) -> Iterator[int]:
    return (at for mark in marks if 0 <= (at := data.find(mark)) <= 64)


def _number(file: BinaryIO, at: int, layout: str) -> int:
    """The integer at byte ``at``; 0 where the file ends before."""
    file.seek(at)
    data = file.read(struct.calcsize(layout))
    return int(struct.unpack(layout, data)[0]) if len(data) == struct.calcsize(layout) else 0


def _rf64(file: BinaryIO, size: int) -> int | None:
    """WAV above 4 GiB: its length stands in a chunk of its own."""
    file.seek(12)
    return _number(file, 20, "<Q") + 8 if file.read(4) == b"ds64" else None


def _wave64(file: BinaryIO, size: int) -> int | None:
    return _number(file, 16, "<Q") or None


def _aiff(file: BinaryIO, size: int) -> int | None:
    stated = _number(file, 4, ">I")
    return None if stated in _UNSTATED else stated + 8


def _sun_audio(file: BinaryIO, size: int) -> int | None:
    length = _number(file, 8, ">I")
    return None if length in _UNSTATED else _number(file, 4, ">I") + length


def _core_audio(file: BinaryIO, size: int) -> int | None:
    """CAF: the end of the chunk with the samples; -1 as its length means to the end."""
    at = 8
    while at + 12 <= size:
        file.seek(at)
        name, length = struct.unpack(">4sq", file.read(12))
        if name == b"data" or length < 0:
            return at + 12 + length if length >= 0 else None
        at += 12 + length
    return at if at > size else None


def _asf(file: BinaryIO, size: int) -> int | None:
    """WMV and WMA: the size in the file properties, unless it was broadcast."""
    file.seek(0)
    head = file.read(4096)
    at = head.find(_ASF_PROPERTIES)
    if at < 0 or at + 92 > len(head) or head[at + 88] & 1:
        return None
    return int.from_bytes(head[at + 40 : at + 48], "little") or None


def _flash(file: BinaryIO, size: int) -> int | None:
    """FLV: the size in its metadata, where the writer put one."""
    file.seek(0)
    head = file.read(4096)
    at = head.find(b"filesize\0")
    if at < 0 or at + 17 > len(head):
        return None
    stated = struct.unpack(">d", head[at + 9 : at + 17])[0]
    return int(stated) if 0 < stated < 2**53 else None


def _ogg(file: BinaryIO, size: int) -> int | None:
    """Ogg states no length, but every page its own: the last one must be there whole."""
    first = max(0, size - _OGG_PAGE)
    file.seek(first)
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0:
        return None
    segments = tail[at + 26] if at + 26 < len(tail) else 255
    lengths = tail[at + 27 : at + 27 + segments]
    return first + at + 27 + segments + sum(lengths) + 255 * (segments - len(lengths))


_OGG_PAGE = 66_000  # above the largest page
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_STATED: dict[bytes, Callable[[BinaryIO, int], int | None]] = {
    b"RF64": _rf64,
    b"riff\x2e\x91\xcf\x11": _wave64,
    b"FORM": _aiff,
    b".snd": _sun_audio,
    b"caff": _core_audio,
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": _asf,
    b"FLV\x01": _flash,
    b"OggS": _ogg,
}
