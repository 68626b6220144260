"""Headers that say less, more or other than what is there; files that are no media; tracks to
choose from."""

from __future__ import annotations

import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image

from avatar_rl.common.errors import DataError
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.media.loader import DecodedAudio, DecodedImage, DecodedVideo, MediaLoader
from avatar_rl.prompts.record import MediaItem
from tests.unit.media_files import tone, write_video, write_wav

RED, BLUE = (200, 30, 10), (10, 30, 200)


def load(path: Path, kind: str, **item: Any) -> Any:
    loader = MediaLoader(MediaConfig(), path.parent)
    return loader.load(MediaItem.model_validate({"kind": kind, "uri": path.name, **item}))


def write_sound(path: Path, codec: str, seconds: float = 4.0, rate: int = 16_000) -> Path:
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            tone(440, seconds, rate)[None], format="fltp", layout="mono"
        )
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for part in av.AudioResampler(track.format, "mono", rate).resample(frame):
            container.mux(track.encode(part))
        container.mux(track.encode(None))
    return path


def faststart(source: Path, target: Path) -> Path:
    """The same streams with the index in front of the media."""
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", options={"movflags": "faststart"}) as made,
    ):
        streams = {s.index: made.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)
    return target


def noisy(path: Path, frames: int = 40) -> Path:
    """A video whose frames take some bytes each."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        codec = "mpeg4" if path.suffix == ".avi" else "libx264"
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
        for _ in range(frames):
            image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "name", ["clip.mp4", "clip.mkv", "clip.avi", "sound.wav", "sound.mp3", "sound.flac"]
)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_file_that_was_cut_is_refused_and_the_whole_one_is_read(
    tmp_path: Path, name: str, kept: float
) -> None:
    kind = "audio" if name.startswith("sound") else "video"
    if name.endswith(".wav"):
        whole = write_wav(tmp_path / name, tone(440, 4.0, 16_000), 16_000)
    elif kind == "audio":
        whole = write_sound(tmp_path / name, {"mp3": "libmp3lame", "flac": "flac"}[name[6:]])
    else:
        whole = noisy(tmp_path / name)
    if name.endswith(".mp4"):
        whole = faststart(whole, tmp_path / "front.mp4")
    decoded = load(whole, kind)
    assert decoded.duration == pytest.approx(5.0 if kind == "video" else 4.0, abs=0.15)
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * kept)])
    with pytest.raises(DataError, match=r"cut_.*(cut short|cannot be decoded).*(again|re-encode)"):
        load(cut, kind)


@pytest.mark.parametrize("stated", [0, 0xFFFFFFFF])
def test_a_streamed_wav_that_states_no_length_is_read_to_its_end(
    tmp_path: Path, stated: int
) -> None:
    path = write_wav(tmp_path / "stream.wav", tone(440, 2.0, 16_000), 16_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = struct.pack("<I", stated)
    path.write_bytes(bytes(data))
    assert load(path, "audio").duration == pytest.approx(2.0, abs=0.01)


def test_a_live_matroska_without_lengths_is_read(tmp_path: Path) -> None:
    path = tmp_path / "live.mkv"
    with av.open(str(path), "w", options={"live": "1"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(16):
            image = np.full((48, 64, 3), 90, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    assert load(path, "video", frames=4).duration == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(
    "mode", ["I;16", "I;16B", "F"], ids=["16 bit", "16 bit big endian", "float 0 to 1"]
)
def test_grey_values_of_more_than_8_bits_keep_their_ramp(tmp_path: Path, mode: str) -> None:
    ramp = np.tile(np.linspace(0, 1, 256), (8, 1))
    values = ramp.astype(np.float32) if mode == "F" else (ramp * 65535).astype(mode_type(mode))
    path = tmp_path / "ramp.tiff"
    Image.fromarray(values).save(path)
    shown = load(path, "image").pixels[0, :, 0].astype(int)
    assert np.abs(shown - np.arange(256)).max() <= 1


def mode_type(mode: str) -> str:
    return ">u2" if mode.endswith("B") else "<u2"


def test_grey_values_without_a_known_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 5000, 64, dtype=np.float32).reshape(8, 8)).save(
        tmp_path / "f.tiff"
    )
    with pytest.raises(DataError, match=r"f\.tiff: has grey values from 0 to 5000.*8 or 16 bits"):
        load(tmp_path / "f.tiff", "image")


@pytest.mark.parametrize("name", ["drawing.png", "drawing.jpg"])
def test_a_format_that_runs_programs_is_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(DataError, match=rf"{name}: not a readable image.*give a PNG, JPEG"):
        load(tmp_path / name, "image")


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "list.mp4": "ffconcat version 1.0\nfile secret.ts\n",
    "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "list.mpd": '<?xml version="1.0"?>\n<MPD type="static"><BaseURL>secret.ts</BaseURL></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, name: str, kind: str) -> None:
    write_video(tmp_path / "secret.ts", [RED] * 8, sound=tone(440, 1.0, 48_000))
    (tmp_path / name).write_text(PLAYLISTS[name])
    with pytest.raises(DataError, match=rf"{name}: is a playlist .*give the media file itself"):
        load(tmp_path / name, kind)


def test_the_default_track_is_played(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    rate = 16_000
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream("aac", rate=rate, layout="mono") for _ in range(2)]
        tracks[0].disposition = Disposition(0)
        tracks[1].disposition = Disposition.default
        for track, samples in zip(
            tracks, (np.zeros(2 * rate, np.float32), tone(440, 2.0, rate)), strict=True
        ):
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    sound: DecodedAudio = load(path, "audio")
    assert np.abs(sound.samples).max() > 0.3


def test_a_chunk_that_begins_between_key_frames_plays_from_the_first_one(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.ts", [RED] * 12 + [BLUE] * 28, gop=12)
    chunk = tmp_path / "chunk.ts"
    with av.open(str(whole)) as given, av.open(str(chunk), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(given.streams.video[0])):
            if packet.dts is not None and number >= 5:
                packet.stream = stream
                made.mux(packet)
    clip: DecodedVideo = load(chunk, "video", frames=4)
    assert clip.frames.shape == (4, 48, 64, 3)
    assert (clip.frames.reshape(4, -1, 3).mean(axis=1)[:, 2] > 100).all()  # blue: from frame 12 on
    late: DecodedVideo = load(chunk, "video", frames=4, clip=(2.0, 3.5))
    assert late.frames.shape == (4, 48, 64, 3)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "song.mp3", "libmp3lame")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cover.png")
    path = tmp_path / "covered.mp3"
    with (
        av.open(str(sound)) as song,
        av.open(str(tmp_path / "cover.png")) as cover,
        av.open(str(path), "w") as made,
    ):
        track = made.add_stream_from_template(song.streams.audio[0])
        picture = made.add_stream_from_template(cover.streams.video[0])
        picture.disposition = Disposition.attached_pic
        for packet in cover.demux():
            if packet.dts is not None:
                packet.stream = picture
                made.mux(packet)
        for packet in song.demux():
            if packet.dts is not None:
                packet.stream = track
                made.mux(packet)
    with pytest.raises(DataError, match=r"covered\.mp3: has no video stream but a cover picture"):
        load(path, "video")
    assert load(path, "audio").duration == pytest.approx(4.0, abs=0.1)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not on this machine")
def test_ffmpeg_hears_the_same(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "sound.mp3", "libmp3lame")
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "1", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    ours: NDArray[np.float32] = load(path, "audio", sample_rate=16_000).samples
    assert abs(len(raw) // 4 - ours.size) <= 1


def test_images_of_every_read_format(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff"):
        path = tmp_path / f"red.{suffix}"
        Image.new("RGB", (16, 8), RED).save(path)
        image: DecodedImage = load(path, "image")
        assert image.pixels.shape == (8, 16, 3) and abs(int(image.pixels[0, 0, 0]) - 200) < 12


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.aiff", "pcm_s16be", {}),
        ("a.au", "pcm_s16be", {}),
        ("a.caf", "pcm_s16le", {}),
        ("a.w64", "pcm_s16le", {}),
        ("a.wav", "pcm_s16le", {"rf64": "always"}),
        ("a.opus", "libopus", {}),
        ("v.flv", "flv", {}),
        ("v.wmv", "wmv2", {}),
    ],
)
def test_a_cut_is_noticed_in_every_container_that_states_a_length(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path, is_video = tmp_path / name, name.startswith("v")
    with av.open(str(path), "w", options=options) as container:
        if is_video:
            track = container.add_stream(codec, rate=10, width=64, height=64, pix_fmt="yuv420p")
            for number in range(20):
                picture = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
                container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        else:
            track = container.add_stream(codec, rate=48_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(
                tone(440, 2.0, 48_000)[None], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.time_base, frame.pts = 48_000, Fraction(1, 48_000), 0
            size = track.codec_context.frame_size or None
            resampler = av.AudioResampler(track.format, "mono", 48_000, frame_size=size)
            for part in (*resampler.resample(frame), *resampler.resample(None)):
                container.mux(track.encode(part))
        container.mux(track.encode(None))
    kind = "video" if is_video else "audio"
    assert load(path, kind).duration == pytest.approx(2.0, abs=0.1)
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    with pytest.raises(DataError, match=r"is cut short: .* that its header promises"):
        load(path, kind)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.mp4", "video"), ("a.wav", "audio"), ("a.png", "image")]
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "fetch it (git lfs pull)"),
        (b"<html>404</html>", "is a web page, not the file itself"),
        (b"PK\x03\x04" + bytes(99), "is packed (zip); unpack it"),
    ],
)
def test_what_lies_in_the_place_of_a_medium_is_named(
    tmp_path: Path, name: str, kind: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name, kind)
    assert words in str(caught.value)


def test_a_picture_whose_download_was_not_ended_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data + bytes(500))  # padding behind the end
    assert load(tmp_path / "a.jpg", "image").pixels.shape == (256, 256, 3)
    half = len(data) // 2
    (tmp_path / "a.jpg").write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(DataError, match=f"its last {len(data) - half} bytes are zeros; copy or"):
        load(tmp_path / "a.jpg", "image")


def test_frames_and_paths_that_cannot_be_are_named(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", [RED] * 16)
    with pytest.raises(DataError, match=r"asked for 1000000 frames, of 16 .* data.media.max_fra"):
        load(clip, "video", frames=1_000_000)
    with pytest.raises(DataError, match=r"File name too long.*correct the media path"):
        load(tmp_path / ("a" * 300 + ".mp4"), "video")
    clip.write_bytes(clip.read_bytes() + b"\x0e\xe2\x8a\x00\xff\xfe\xfd\xfc" * 9)  # no box
    assert load(clip, "video", frames=2).frames.shape[0] == 2
