"""A folder of frames as a video: MVBench has one for each clip of a TV series."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import av
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from avatar_rl.common.errors import InputError
from avatar_rl.common.files import replaced_file

#: Codec and pixel format of a picture file, which becomes a packet as it is.
_CODECS = {".jpg": ("mjpeg", "yuvj420p"), ".jpeg": ("mjpeg", "yuvj420p"), ".png": ("png", "rgb24")}


def frames_in(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _CODECS)


def video_of(frames: list[Path], fps: int, out: Path) -> Path:
    """A Matroska file in ``out`` with these frames, ``fps`` a second, none encoded anew. It is
    written once: its name follows from the frames' paths, sizes and times.

    Raises InputError for a picture that cannot be opened, or frames of several types."""
    stamps = [(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in frames]
    path = out / f"{hashlib.sha256(repr((stamps, fps)).encode()).hexdigest()[:32]}.mkv"
    if path.is_file():
        return path
    codecs = {_CODECS[one.suffix.lower()] for one in frames}
    if len(codecs) > 1:
        raise InputError(
            frames[0].parent, "holds both JPEG and PNG frames", "convert them to one type"
        )
    [(codec, pixels)] = codecs
    try:
        with Image.open(frames[0]) as first:
            width, height = first.size
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(frames[0], f"is no picture ({error})", "copy it again") from error
    out.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as beside, av.open(str(beside), "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for number, frame in enumerate(frames):
            packet = av.Packet(frame.read_bytes())
            packet.stream, packet.time_base = stream, Fraction(1, fps)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)
    return path
