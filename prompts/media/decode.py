"""Video and sound of one file as arrays (PyAV, soundfile). Deterministic, and nothing is cached."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from avatar_rl.common.errors import InputError
from avatar_rl.prompts.media.completeness import check_whole, wav_states_no_length

_SOUNDFILE_SUFFIXES = {".wav", ".flac"}
_AUDIO_GAP_S = 0.05  # a jump of time stamps beyond this is silence, below it is rounding
_RUN_UP_S = 1.0  # decoded before a clip: codecs with memory need earlier packets to sound right
#: Seeking is exact in these; MP3 guesses from byte positions.
_INDEXED_FORMATS = {"mp4", "mov", "matroska", "webm"}
#: Containers that hold their media themselves. Playlists (HLS, DASH, concat, SDP) open other files.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,mp3,flac,aac,"
    "aiff,caf,au,amr,amrnb,amrwb,ac3,eac3,dts,ape,wv,tta,h264,hevc,m4v,av1,obu,ivf,gif,apng,mjpeg,dv,mxf,nut,rm,"
    "yuv4mpegpipe"
)
_PLAYLISTS = {
    b"#EXTM3U": "HLS",
    b"ffconcat": "ffconcat",
    b"v=0": "SDP",
    b"<?xml": "DASH or XML",
    b"<MPD": "DASH",
}
_TICKS_BY_INDEX = 1_000_000  # ticks per second where the container has no time stamps


class PastEndError(InputError):
    """A clip window that runs past the end of its file, or holds no sound because the track ends
    before it."""


class NoSoundError(InputError):
    """A file without a sound track."""


class Sampling(NamedTuple):
    """How many frames of a clip are taken."""

    frames: int | None  # this many; None: by rate
    fps: float  # rate, where frames is None
    max_frames: int  # and then no more than this


class Timeline(NamedTuple):
    """Presentation times of every frame of a video, in ticks of its stream."""

    ticks: list[int]  # ascending
    keys: list[int]  # ascending; decoding can start from these; empty: only from the beginning
    seconds: float  # per tick
    origin: float  # seconds on the file's clock that count as 0
    duration: float  # seconds from origin to the end of the last frame
    counted: bool  # no time stamps: ticks come from counting frames at the average rate


def decode_video(
    path: Path,
    *,
    clip: tuple[float, float] | None,
    sampling: Sampling,
    max_pixels: int,
    slack: float,
    threads: int,
) -> tuple[NDArray[np.uint8], float, float]:
    """Frames uint8 (F, H, W, 3) sampled uniformly over the clip, their rate (1/s) and the clip's
    length (s).

    The clip is cut into F equal parts and the frame on screen at the middle of each is taken, so F
    / length is the exact rate. F is ``sampling.frames``, or what its rate gives but no more than
    the file holds or ``max_frames``; F is rounded up to even (a temporal patch is two frames).
    Larger frames shrink to ``max_pixels``. Raises InputError for a file that cannot be decoded, a
    clip past its end, or frames that change their size."""
    with _open(path) as container:
        line = _timeline(container, path)
    start, end = window(path, clip, line.duration, slack)
    times = [tick * line.seconds - line.origin for tick in line.ticks]
    frames = sampling.frames
    if frames is None:
        held = bisect_right(times, end - 1e-6) - max(0, bisect_right(times, start + 1e-6) - 1)
        frames = max(1, min(round((end - start) * sampling.fps), held, sampling.max_frames))
    elif frames > max(sampling.max_frames, len(times)):
        raise InputError(
            path,
            f"is asked for {frames} frames, of {len(times)} that it has",
            f"ask for fewer, or raise data.media.max_frames (now {sampling.max_frames})",
        )
    count = frames + frames % 2
    step = (end - start) / count
    picked = [max(0, bisect_right(times, start + (i + 0.5) * step) - 1) for i in range(count)]
    targets = [line.ticks[index] for index in picked]
    images = _decode_at(path, line, sorted(set(targets)), max_pixels, threads)
    if len(sizes := {image.shape[1::-1] for image in images.values()}) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise InputError(
            path,
            f"changes its frame size half-way (sampled frames of {shown})",
            "re-encode it to one size (ffmpeg -i IN OUT.mp4), or choose a clip window with one "
            "size",
        )
    return np.stack([images[target] for target in targets]), count / (end - start), end - start


def decode_audio(
    path: Path, *, clip: tuple[float, float] | None, sample_rate: int, slack: float
) -> tuple[NDArray[np.float32], float]:
    """Mono samples float32 (S,) at ``sample_rate`` Hz (mean of the channels) and their length in
    seconds.

    A sound track that starts late in its file is padded with silence in front, so that it stays
    aligned with the video; one that ends early is simply shorter. Raises PastEndError where nothing
    of it is left, InputError for what cannot be decoded."""
    native = (
        _read_soundfile(path, clip, slack) if path.suffix.lower() in _SOUNDFILE_SUFFIXES else None
    )
    samples, rate = native if native is not None else _read_audio_stream(path, clip, slack)
    if samples.size == 0:
        raise PastEndError(
            path, f"no sound in {_span(clip)}", "choose another clip window or drop the item"
        )
    if not np.isfinite(samples).all():
        raise InputError(
            path,
            "holds samples that are not finite numbers",
            "re-encode it (ffmpeg -i IN -c:a flac)",
        )
    samples = resample(samples, rate, sample_rate)
    return samples, samples.size / sample_rate


def silence(
    path: Path, *, clip: tuple[float, float] | None, sample_rate: int, slack: float
) -> tuple[NDArray[np.float32], float]:
    """In the place of the sound that a video lacks: samples and seconds of its clip. Raises as
    ``decode_video`` does."""
    with _open(path) as container:
        line = _timeline(container, path)
    start, end = window(path, clip, line.duration, slack)
    samples = np.zeros(max(1, round((end - start) * sample_rate)), np.float32)
    return samples, samples.size / sample_rate


class Streams(NamedTuple):
    """What a container says of itself."""

    codecs: dict[str, str]  # by kind of stream
    duration: float | None  # seconds


def streams_of(path: Path) -> Streams:
    """Codecs and length, without decoding. Raises InputError as ``decode_video`` does."""
    with _open(path) as container:
        known = [stream for stream in container.streams if stream.codec_context is not None]
        length = container.duration / av.time_base if container.duration else None
        return Streams({stream.type: stream.codec_context.name for stream in known}, length)


def resample(samples: NDArray[np.float32], rate: int, target: int) -> NDArray[np.float32]:
    """Band-limited resampling of (S,) from ``rate`` to ``target`` Hz; length ceil(S * target /
    rate)."""
    if rate == target:
        return samples
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=target)
    # silence behind it lets the filter (32 taps of the lower rate) run out: libswresample drops
    # what it holds back
    padded = np.pad(samples, (0, 64 * -(-max(rate, target) // target)))
    frame = av.AudioFrame.from_ndarray(padded[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    parts = [
        part.to_ndarray()[0] for part in chain(resampler.resample(frame), resampler.resample(None))
    ]
    wanted = -(-samples.size * target // rate)
    joined = np.concatenate(parts)
    if joined.size < wanted:
        raise AssertionError(
            f"resampling {samples.size} samples from {rate} to {target} Hz gave {joined.size}"
        )
    return joined[:wanted].astype(np.float32, copy=False)


def window(
    path: Path, clip: tuple[float, float] | None, duration: float, slack: float
) -> tuple[float, float]:
    """[start, end) in seconds, ``clip`` cut at ``duration``. Raises PastEndError when it lies
    beyond the end."""
    if duration <= 0:
        raise InputError(path, "lasts 0 s", "replace the file or drop the row")
    if clip is None:
        return 0.0, duration
    if clip[0] >= duration or clip[1] > duration + slack:
        raise PastEndError(
            path,
            f"clip {_span(clip)} runs past the end at {duration:.3f} s",
            f"correct the window, or raise data.media.window_slack (now {slack:g} s)",
        )
    return clip[0], min(clip[1], duration)


def _span(clip: tuple[float, float] | None) -> str:
    return "the whole file" if clip is None else f"[{clip[0]:g}, {clip[1]:g}) s"


@contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    """The opened file; what libav says about it becomes a DataError."""
    check_whole(path)
    try:
        with av.open(
            str(path),
            metadata_errors="replace",  # titles need not be UTF-8
            options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"},
        ) as container:
            yield container
    except av.FFmpegError as error:
        if (kind := _playlist(path)) is not None:
            raise InputError(
                path,
                f"is a playlist ({kind}), which would open other files",
                "give the media file itself (ffmpeg -i IN -c copy OUT.mp4)",
            ) from error
        raise InputError(
            path,
            f"cannot be decoded ({error.strerror})",
            "the file is corrupt, cut short or of an unknown format: copy it again, or re-encode "
            "it (ffmpeg -i IN -c:v libx264 -c:a aac OUT.mp4)",
        ) from error


def _playlist(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((kind for mark, kind in _PLAYLISTS.items() if head.startswith(mark)), None)


def _video_stream(container: InputContainer, path: Path) -> av.VideoStream:
    """The one that players show: the default track, else the largest; no cover picture."""
    shown = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not shown:
        raise InputError(
            path,
            "has no video stream" + (" but a cover picture" if container.streams.video else ""),
            "give the item kind 'audio' or 'image', or correct its path",
        )
    return max(shown, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))


def _audio_stream(container: InputContainer, path: Path) -> av.AudioStream:
    """The one that players play: the default track, else that of most channels, else the first."""
    if not container.streams.audio:
        raise NoSoundError(
            path,
            "has no audio stream",
            "drop the audio item (or audio_in_video), mux sound in, or set "
            "data.media.missing_sound: silence",
        )
    return max(
        container.streams.audio,
        key=lambda s: (bool(s.disposition & Disposition.default), s.channels),
    )


def _origin(container: InputContainer) -> float:
    """Seconds on the file's clock that count as 0 (negative starts are codec priming, which is
    discarded)."""
    return max(0.0, (container.start_time or 0) / av.time_base)


def _timeline(container: InputContainer, path: Path) -> Timeline:
    """Frame times from the packet headers, without decoding where the container has time stamps."""
    stream = _video_stream(container, path)
    packets = [  # their headers alone: kept whole they would hold the file in memory
        (packet.pts, packet.is_keyframe, packet.duration)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]
    if not packets:
        raise InputError(path, "its video stream has no frames", "replace the file or drop the row")
    if stream.time_base is None or any(pts is None for pts, _, _ in packets):
        return _counted_timeline(path)
    ticks = sorted({int(pts) for pts, _, _ in packets if pts is not None})
    keys = sorted(int(pts) for pts, is_key, _ in packets if is_key and pts is not None)
    if keys and not packets[0][1]:  # a chunk of a stream: it plays from its first key frame on
        ticks = ticks[bisect_left(ticks, keys[0]) :]
    seconds = float(stream.time_base)
    # the last frame's own length can be missing or wrong, the usual spacing is there as soon as
    # there are two
    last = float(np.median(np.diff(ticks))) if len(ticks) > 1 else float(packets[-1][2] or 0)
    if last <= 0:
        last = 1 / (float(stream.average_rate or 1) * seconds)
    first = min(int(pts) for pts, _, _ in packets if pts is not None)
    origin = min(_origin(container), first * seconds)
    return Timeline(
        ticks, keys, seconds, origin, (ticks[-1] + last) * seconds - origin, counted=False
    )


def _counted_timeline(path: Path) -> Timeline:
    """For elementary streams and old AVI files: decode once, count, and go by the average rate."""
    with _open(path) as container:
        stream = _video_stream(container, path)
        rate = stream.average_rate
        count = sum(1 for _ in container.decode(stream))
    if not rate or not count:
        raise InputError(path, "has neither time stamps nor a frame rate", "re-encode it as .mp4")
    ticks = [round(index * _TICKS_BY_INDEX / rate) for index in range(count)]
    return Timeline(ticks, [], 1 / _TICKS_BY_INDEX, 0.0, count / float(rate), counted=True)


def _decode_at(
    path: Path, line: Timeline, targets: list[int], max_pixels: int, threads: int
) -> dict[int, NDArray[np.uint8]]:
    """Image of each target tick; skips by key frame, or reads through where skipping misses."""
    if line.keys:
        found = _read_targets(path, line, targets, line.keys, max_pixels, threads)
        if len(found) == len(targets):
            return found
    found = _read_targets(path, line, targets, [], max_pixels, threads)
    if len(found) < len(targets):
        lost = next(target for target in targets if target not in found)
        raise InputError(
            path,
            f"no intact frame at {lost * line.seconds - line.origin:.3f} s, though its index "
            "promises one",
            "the file is corrupt or cut short: copy it again or shorten the clip",
        )
    return found


def _read_targets(
    path: Path, line: Timeline, targets: list[int], keys: list[int], max_pixels: int, threads: int
) -> dict[int, NDArray[np.uint8]]:
    """The targets that decoding delivers, seeking to each one's key frame when that saves work."""
    found: dict[int, NDArray[np.uint8]] = {}
    # a stream coded by field has twice the packets: then the frame just before the target is the
    # right one
    tolerance = 2 * float(np.median(np.diff(line.ticks))) if len(line.ticks) > 1 else 0.0
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.codec_context.thread_count = threads
        # One for all frames. A frame's own would start a thread for each core and end them again,
        # which took ten times as long as converting a small frame.
        reformatter = VideoReformatter()
        decoded = _ticked(container, stream, line)
        current: tuple[int, av.VideoFrame] | None = None
        ahead = next(decoded, None)
        for target in targets:
            at = bisect_right(keys, target) - 1
            if at >= 0 and ahead is not None and keys[at] > ahead[0]:
                container.seek(keys[at], stream=stream)
                decoded = _ticked(container, stream, line)
                current, ahead = None, next(decoded, None)
            while ahead is not None and ahead[0] <= target:
                current, ahead = ahead, next(decoded, None)
            if (
                current is not None
                and target - current[0] <= tolerance
                and not current[1].is_corrupt
            ):
                found[target] = _rgb(reformatter, current[1], max_pixels, threads)
    return found


def _ticked(
    container: InputContainer, stream: av.VideoStream, line: Timeline
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decoded frames from here on with their ticks."""
    for index, frame in enumerate(container.decode(stream)):
        if line.counted:
            yield line.ticks[min(index, len(line.ticks) - 1)], frame
        elif frame.pts is not None:
            yield int(frame.pts), frame


def _rgb(
    reformatter: VideoReformatter, frame: av.VideoFrame, max_pixels: int, threads: int
) -> NDArray[np.uint8]:
    """uint8 (H, W, 3), upright, at most ``max_pixels``."""
    width, height = shrunk(frame.width, frame.height, max_pixels)
    same = (width, height) == (frame.width, frame.height)
    how = None if same else "BICUBIC"
    made = reformatter.reformat(frame, width, height, "rgb24", interpolation=how, threads=threads)
    image = made.to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)), dtype=np.uint8)


def shrunk(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) scaled down to at most ``max_pixels``, proportions kept."""
    scale = math.sqrt(max_pixels / (width * height))
    return (
        (width, height) if scale >= 1 else (max(1, int(width * scale)), max(1, int(height * scale)))
    )


def _read_soundfile(
    path: Path, clip: tuple[float, float] | None, slack: float
) -> tuple[NDArray[np.float32], int] | None:
    """Mono samples of the clip at the native rate, or None for a codec that libsndfile does not
    know."""
    check_whole(path)
    if wav_states_no_length(path):  # libsndfile takes it for empty, FFmpeg reads to its end
        return None
    try:
        file = soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError:
        return None
    with file:
        start, end = window(path, clip, file.frames / file.samplerate, slack)
        first = round(start * file.samplerate)
        try:
            file.seek(first)
            samples = file.read(
                round(end * file.samplerate) - first, dtype="float32", always_2d=True
            )
        except soundfile.LibsndfileError as error:
            raise InputError(
                path, f"cannot be decoded ({error})", "copy the file again or drop the row"
            ) from error
        if len(samples) < round(end * file.samplerate) - first:
            raise InputError(
                path,
                f"is cut short: {first + len(samples)} of the samples that its header promises",
                "copy or download the file again, or drop the row",
            )
        return samples.mean(axis=1, dtype=np.float32), int(file.samplerate)


def _read_audio_stream(
    path: Path, clip: tuple[float, float] | None, slack: float
) -> tuple[NDArray[np.float32], int]:
    """Mono samples of the clip of the default audio stream, at its native rate."""
    with _open(path) as container:
        stream = _audio_stream(container, path)
        origin, duration = _origin(container), (container.duration or 0) / av.time_base
        start, end = clip or (0.0, math.inf)
        if clip is not None and duration > 0:
            start, end = window(path, clip, duration, slack)
        if start > _RUN_UP_S and set(container.format.name.split(",")) & _INDEXED_FORMATS:
            container.seek(int((start - _RUN_UP_S + origin) * av.time_base))
        if stream.duration is not None and stream.time_base is not None:
            # what lies beyond is the encoder's padding
            end = min(
                end, float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin
            )
        pieces, rate = _placed(container, stream, path, origin, end)
    reached = pieces[-1][0] + pieces[-1][1].size if pieces else 0
    if clip is not None and reached < end * rate and duration <= 0:
        # only now is the length of a file without a header known
        window(path, clip, reached / rate, slack)
    first, last = round(start * rate), min(reached, round(min(end * rate, reached)))
    samples = np.zeros(max(0, last - first), np.float32)
    for at, piece in pieces:
        low, high = max(at, first), min(at + piece.size, last)
        if low < high:
            samples[low - first : high - first] = piece[low - at : high - at]
    return samples, rate


def _placed(
    container: InputContainer, stream: av.AudioStream, path: Path, origin: float, end: float
) -> tuple[list[tuple[int, NDArray[np.float32]]], int]:
    """(sample index from the origin, mono samples) of each decoded frame up to ``end`` seconds, and
    the rate."""
    planar = av.AudioResampler(format="fltp")
    pieces: list[tuple[int, NDArray[np.float32]]] = []
    cursor, rate = 0, stream.rate
    for frame in container.decode(stream):
        if pieces and frame.sample_rate != rate:
            raise InputError(
                path,
                f"changes its sample rate half-way ({rate} to {frame.sample_rate} Hz)",
                "re-encode it",
            )
        rate = frame.sample_rate  # with HE-AAC the stream's header names half the decoded rate
        at = cursor if frame.time is None else round((frame.time - origin) * rate)
        if pieces and abs(at - cursor) <= _AUDIO_GAP_S * rate:
            at = cursor
        mono = np.concatenate(
            [part.to_ndarray().mean(axis=0, dtype=np.float32) for part in planar.resample(frame)]
        )
        pieces.append((at, mono))
        cursor = at + mono.size
        if cursor >= end * rate:
            break
    return pieces, rate
