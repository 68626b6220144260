"""Group C: media files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import av
import numpy as np
import soundfile
from PIL import Image

from benchmarks.bad_inputs.entries import BadInput, medium
from tests.unit.media_files import tone, write_video, write_wav

RED, RATE = (200, 30, 10), 16_000
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "list.mp4": "ffconcat version 1.0\nfile secret.ts\n",
    "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "list.mpd": '<?xml version="1.0"?>\n<MPD type="static"><BaseURL>secret.ts</BaseURL></MPD>',
}


def content(name: str, data: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return name

    return write


def named(name: str) -> Callable[[Path], str]:
    """A file that is not there."""
    return lambda folder: name


def directory(folder: Path) -> str:
    (folder / "clip.mp4").mkdir()
    return "clip.mp4"


def outside(folder: Path) -> str:
    (folder / "allowed").mkdir()
    return sound(folder)


def linked_outside(folder: Path) -> str:
    (folder / "allowed").mkdir()
    os.symlink(folder / sound(folder), folder / "allowed" / "link.wav")
    return "allowed/link.wav"


def video(folder: Path) -> str:
    """Two seconds without sound."""
    write_video(folder / "clip.mp4", [RED] * 16)
    return "clip.mp4"


def sound(folder: Path) -> str:
    """Two seconds."""
    write_wav(folder / "sound.wav", tone(440, 2.0, RATE), RATE)
    return "sound.wav"


def noisy(name: str) -> Callable[[Path], str]:
    """A video whose frames take some bytes each; MP4 has its index in front."""

    def write(folder: Path) -> str:
        rng = np.random.default_rng(0)
        options = {"movflags": "faststart"} if name.endswith(".mp4") else {}
        with av.open(str(folder / name), "w", options=options) as container:
            codec = "mpeg4" if name.endswith(".avi") else "libx264"
            stream = cast(av.VideoStream, container.add_stream(codec, rate=8))
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
            for _ in range(24):
                image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return name

    return write


def coded(name: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        soundfile.write(str(folder / name), tone(440, 4.0, RATE), RATE)
        return name

    return write


def image(name: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        return name

    return write


def cut(whole: Callable[[Path], str], kept: float) -> Callable[[Path], str]:
    """What is left of a file that was copied in part."""

    def write(folder: Path) -> str:
        path = folder / whole(folder)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        return path.name

    return write


def float_grey(folder: Path) -> str:
    values = np.linspace(0, 5000, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(folder / "grey.tiff")
    return "grey.tiff"


def not_finite(folder: Path) -> str:
    samples = tone(440, 1.0, RATE)
    samples[100] = np.nan
    soundfile.write(str(folder / "nan.wav"), samples, RATE, subtype="FLOAT")
    return "nan.wav"


def no_samples(folder: Path) -> str:
    soundfile.write(str(folder / "none.wav"), np.zeros(0, np.float32), RATE)
    return "none.wav"


def bomb(folder: Path) -> str:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    size = (60_000).to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + bytes((8, 2, 0, 0, 0)))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000)))
    (folder / "bomb.png").write_bytes(data + chunk(b"IEND", b""))
    return "bomb.png"


def playlist(name: str) -> Callable[[Path], str]:
    return content(name, PLAYLISTS[name].encode())


def zeros(whole: Callable[[Path], str], kept: float) -> Callable[[Path], str]:
    """A download that was not ended, in a file of the right size."""

    def write(folder: Path) -> str:
        path = folder / whole(folder)
        data = path.read_bytes()
        size = int(len(data) * kept)
        path.write_bytes(data[:size] + bytes(len(data) - size))
        return path.name

    return write


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
DIGEST = "0" * 64
CUT = ("cut short", "again")
TABLE: tuple[tuple[str, str, Callable[[Path], str], dict[str, object], tuple[str, ...]], ...] = (
    ("absent_video", "video", named("no.mp4"), {}, ("no.mp4: no such file", "media_root")),
    ("absent_image", "image", named("no.png"), {}, ("no.png: no such file", "media_root")),
    ("empty_video", "video", content("e.mp4", b""), {}, ("e.mp4: is empty", "download it again")),
    ("empty_image", "image", content("e.png", b""), {}, ("e.png: is empty", "drop the row")),
    ("folder", "video", directory, {}, ("clip.mp4: not a file", "correct the media path")),
    ("remote", "video", named("https://h/a.mp4"), {}, ("https://h/a.mp4", "download them first")),
    ("text_as_video", "video", content("t.mp4", b"hello " * 99), {}, ("t.mp4", "re-encode it")),
    ("text_as_sound", "audio", content("t.wav", b"hello " * 99), {}, ("t.wav", "re-encode it")),
    ("text_as_image", "image", content("t.png", b"hello " * 99), {}, ("t.png", "give a PNG, JPEG")),
    ("eps_as_png", "image", content("d.png", EPS), {}, ("d.png: not a readable", "give a PNG")),
    ("eps_as_jpg", "image", content("d.jpg", EPS), {}, ("d.jpg: not a readable", "give a PNG")),
    ("svg", "image", content("d.svg", b"<svg/>"), {}, ("d.svg: not a readable", "give a PNG")),
    ("bomb", "image", bomb, {}, ("bomb.png", "give a PNG, JPEG")),
    ("grey", "image", float_grey, {}, ("grey values from 0 to 5000", "8 or 16 bits")),
    ("changed", "audio", sound, {"digest": DIGEST}, ("sha256", "fetch it again")),
    ("nan_samples", "audio", not_finite, {}, ("nan.wav", "not finite", "re-encode it")),
    ("no_samples", "audio", no_samples, {}, ("none.wav", "lasts 0 s", "drop the row")),
    ("no_sound", "audio", video, {}, ("clip.mp4: has no audio stream", "drop the audio item")),
    ("no_picture", "video", sound, {}, ("sound.wav: has no video stream", "kind 'audio'")),
    ("video_as_image", "image", video, {}, ("clip.mp4: not a readable image", "give a PNG")),
    ("late_video", "video", video, {"clip": (9, 12)}, ("past the end at 2.000", "window_slack")),
    ("late_sound", "audio", sound, {"clip": (9, 12)}, ("past the end at 2.000", "window_slack")),
    ("long_window", "video", video, {"clip": (0, 60)}, ("past the end at 2.000", "the window")),
    ("outside_roots", "audio", outside, {"roots": True}, ("outside data.media.roots", "add its")),
    ("link_outside", "audio", linked_outside, {"roots": True}, ("sound.wav", "add its folder")),
    *(
        (
            f"cut_{name}_{kept}",
            "video",
            cut(noisy(f"clip.{name}"), kept),
            {},
            (f"clip.{name}", "again"),
        )
        for name in ("mp4", "mkv", "avi")
        for kept in (0.5, 0.9)
    ),
    *(
        (f"cut_{name}", "audio", cut(coded(f"sound.{name}"), 0.6), {}, (f"sound.{name}", "again"))
        for name in ("wav", "mp3", "flac", "ogg")
    ),
    *(
        (f"{name}_as_{kind}", kind, content(f"a.{end}", data), {}, (f"a.{end}", *words))
        for kind, end in (("video", "mp4"), ("audio", "wav"), ("image", "png"))
        for name, data, words in (
            ("lfs", LFS, ("pointer of Git LFS", "git lfs pull")),
            ("web_page", b"<!DOCTYPE html>404", ("is a web page", "download")),
            ("zip", b"PK\x03\x04" + bytes(99), ("packed (zip)", "unpack it")),
        )
    ),
    ("zeros_jpg", "image", zeros(image("p.jpg"), 0.5), {}, ("p.jpg", "are zeros", "again")),
    ("zeros_mp4", "video", zeros(noisy("clip.mp4"), 0.5), {}, ("clip.mp4", "copy it again")),
    ("many_frames", "video", video, {"frames": 10**6}, ("1000000 frames, of 16", "ask for fewer")),
    ("long_name", "video", named("a" * 300), {}, ("name too long", "correct the media path")),
    ("nul", "video", named("a\0.mp4"), {}, ("NUL", "correct the media path")),
    ("cut_png", "image", cut(image("p.png"), 0.5), {}, ("p.png: not a readable", "drop the row")),
    ("cut_jpg", "image", cut(image("p.jpg"), 0.5), {}, ("p.jpg: not a readable", "drop the row")),
    *(
        (f"playlist_{kind}_{name[5:]}", kind, playlist(name), {}, ("is a playlist", "file itself"))
        for name in PLAYLISTS
        for kind in ("video", "audio")
    ),
)
ENTRIES = [
    BadInput("C", name, medium(kind, write, **item), words)
    for name, kind, write, item, words in TABLE
]
