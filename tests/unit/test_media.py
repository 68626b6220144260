"""Decoding and caching of media files, against colours and tones that the test itself put into
them."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from avatar_rl.common.errors import DataError, InputError
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.media.cache import DiskCache, Entry, MemoryCache
from avatar_rl.prompts.media.decode import resample
from avatar_rl.prompts.media.loader import DecodedAudio, DecodedImage, DecodedVideo, MediaLoader
from avatar_rl.prompts.record import MediaItem, MediaPlan, resolve_uri
from tests.unit.media_files import mean_colours, tone, write_video, write_wav

# 24 colours that differ by far more than H.264 changes them (about 3 levels)
COLOURS = [((40 * i) % 250, (255 - 30 * i) % 250, (70 * i) % 250) for i in range(24)]


def loader(folder: Path, **config: object) -> MediaLoader:
    return MediaLoader(MediaConfig.model_validate(config), folder)


def video(folder: Path, media: MediaLoader | None = None, /, **item: Any) -> DecodedVideo:
    loaded = (media or loader(folder)).load(
        MediaItem.model_validate({"kind": "video", "uri": "clip.mp4", **item})
    )
    assert isinstance(loaded, DecodedVideo)
    return loaded


def audio(folder: Path, uri: str, **item: Any) -> DecodedAudio:
    loaded = loader(folder).load(MediaItem.model_validate({"kind": "audio", "uri": uri, **item}))
    assert isinstance(loaded, DecodedAudio)
    return loaded


def peak_hertz(decoded: DecodedAudio) -> float:
    spectrum = np.abs(np.fft.rfft(decoded.samples * np.hanning(decoded.samples.size)))
    return float(spectrum.argmax() * decoded.sample_rate / decoded.samples.size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.mp4: 24 plain frames at 8 per second (3 s), key frames 4 apart, B-frames, a 440 Hz sound
    track."""
    path = tmp_path_factory.mktemp("media")
    write_video(path / "clip.mp4", COLOURS, sound=tone(440, 3, 48_000))
    write_video(path / "silent.mp4", COLOURS[:4])
    write_wav(path / "tone.wav", tone(1_000, 2, 44_100), 44_100)
    return path


@pytest.mark.parametrize(
    ("item", "expected", "fps"),
    [
        ({"frames": 24}, list(range(24)), 8.0),
        ({"frames": 4}, [3, 9, 15, 21], 4 / 3),  # middles of four 0.75 s parts: 0.375, 1.125, ... s
        ({"frames": 3}, [3, 9, 15, 21], 4 / 3),  # an odd count becomes even
        ({"frames": 4, "clip": (1.0, 2.0)}, [9, 11, 13, 15], 4.0),  # 1.125, 1.375, ... s
        ({"frames": 2, "clip": (2.0, 3.4)}, [18, 22], 2.0),  # the end is cut at 3 s: 2.25, 2.75 s
        ({"fps": 2.0}, [2, 6, 10, 14, 18, 22], 2.0),
        ({"fps": 2.0, "clip": (0.0, 1.5)}, [1, 4, 7, 10], 4 / 1.5),  # three frames, made four
        ({"fps": 100.0}, list(range(24)), 8.0),  # no more than the file holds
    ],
)
def test_video_frames_are_those_on_screen_at_the_middle_of_each_part(
    folder: Path, item: dict[str, Any], expected: list[int], fps: float
) -> None:
    decoded = video(folder, **item)
    assert decoded.frames.dtype == np.uint8 and decoded.frames.shape == (len(expected), 48, 64, 3)
    np.testing.assert_allclose(
        mean_colours(decoded.frames), np.array([COLOURS[i] for i in expected]), atol=4
    )
    assert decoded.fps == pytest.approx(fps)
    assert decoded.duration == pytest.approx(len(expected) / fps)


def test_video_without_a_rate_follows_the_config_and_its_cap(folder: Path) -> None:
    assert video(folder, loader(folder, fps=4.0)).frames.shape[0] == 12
    capped = video(folder, loader(folder, fps=8.0, max_frames=6))
    assert capped.frames.shape[0] == 6 and capped.fps == pytest.approx(2.0)


def test_frames_beyond_the_bound_shrink_and_keep_their_proportions(folder: Path) -> None:
    decoded = video(folder, frames=4, max_pixels=768)  # a quarter of 64 x 48
    assert decoded.frames.shape == (4, 24, 32, 3)
    np.testing.assert_allclose(
        mean_colours(decoded.frames), np.array([COLOURS[i] for i in (3, 9, 15, 21)]), atol=4
    )


@pytest.mark.parametrize("bound", [768, 3072])
def test_converting_frames_starts_no_threads_and_changes_no_pixel(folder: Path, bound: int) -> None:
    running = lambda: len(os.listdir("/proc/self/task"))  # noqa: E731
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(running())

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = running()
    try:
        for number in range(20):  # not of the cache
            decoded = video(folder, frames=24, max_pixels=bound + number % 2)
    finally:
        done.set()
        watcher.join()
    assert seen and max(seen) == before
    with av.open(str(folder / "clip.mp4")) as container:  # by a context of each frame's own
        size = {} if bound == 3072 else {"width": 32, "height": 24, "interpolation": "BICUBIC"}
        frames = [one.to_ndarray(format="rgb24", **size) for one in container.decode(video=0)]
    assert np.array_equal(decoded.frames, np.stack(frames))


def test_a_video_without_time_stamps_goes_by_its_average_rate(folder: Path, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.h264"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for colour in COLOURS[:10]:
            image = np.tile(np.array(colour, np.uint8), (48, 64, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    decoded = video(tmp_path, uri="clip.h264", frames=10)
    np.testing.assert_allclose(mean_colours(decoded.frames), np.array(COLOURS[:10]), atol=4)
    assert decoded.fps == pytest.approx(25)


def test_wav_is_resampled_to_the_asked_rate(folder: Path) -> None:
    decoded = audio(folder, "tone.wav")
    assert decoded.samples.dtype == np.float32 and decoded.samples.shape == (32_000,)
    assert peak_hertz(decoded) == pytest.approx(1_000, abs=0.5)
    # away from the edges it is the sine itself, in phase
    np.testing.assert_allclose(
        decoded.samples[500:-500], tone(1_000, 2, 16_000)[500:-500], atol=1e-4
    )


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 192_000])
@pytest.mark.parametrize("count", [1, 2, 17, 100, 5_001])
def test_resampling_loses_nothing_at_the_end(rate: int, count: int) -> None:
    ramp = (
        np.linspace(-0.5, 0.5, count, dtype=np.float32)
        if count > 2
        else np.full(count, 0.5, np.float32)
    )
    again = resample(ramp, rate, 16_000)
    assert again.size == math.ceil(count * 16_000 / rate)
    # the integral over time is kept (Shannon), but for the ripple at the two cut edges
    assert abs(again.sum() / 16_000 - ramp.sum() / rate) < 2 / 16_000


def test_tones_above_the_new_nyquist_frequency_vanish(tmp_path: Path) -> None:
    write_wav(tmp_path / "high.wav", tone(12_000, 1, 44_100), 44_100)
    assert np.abs(audio(tmp_path, "high.wav").samples[500:-500]).max() < 1e-3


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = tone(500, 1, 16_000), tone(500, 1, 16_000, amplitude=0.1)
    write_wav(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 16_000)
    np.testing.assert_allclose(
        audio(tmp_path, "stereo.wav").samples, (left + right) / 2, atol=1e-4
    )  # 16-bit file


def test_wav_clip_is_cut_at_the_sample(folder: Path) -> None:
    decoded = audio(folder, "tone.wav", clip=(0.5, 0.75), sample_rate=44_100)
    np.testing.assert_allclose(decoded.samples, tone(1_000, 2, 44_100)[22_050:33_075], atol=1e-4)


def test_sound_track_of_a_video(folder: Path) -> None:
    decoded = audio(folder, "clip.mp4")
    assert decoded.samples.size == 48_000 and decoded.duration == 3.0
    assert peak_hertz(decoded) == pytest.approx(440, abs=0.5)
    error = np.abs(decoded.samples - tone(440, 3, 16_000))
    assert np.median(error) < 0.02  # in phase with the video's clock, but for what AAC loses


def test_clip_of_a_sound_track_is_that_part_of_the_whole(folder: Path) -> None:
    whole = audio(folder, "clip.mp4", sample_rate=48_000).samples
    part = audio(folder, "clip.mp4", sample_rate=48_000, clip=(2.0, 2.5)).samples
    np.testing.assert_allclose(
        part, whole[96_000:120_000], atol=1e-4
    )  # AAC fills in noise of its own


def test_image_is_upright_and_bounded(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = (200, 30, 10)  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees: left comes up
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    decoded = loader(tmp_path).load(MediaItem(kind="image", uri="photo.png", max_pixels=800))
    assert isinstance(decoded, DecodedImage)
    assert decoded.pixels.shape == (40, 20, 3)
    np.testing.assert_allclose(decoded.pixels[:15].mean(axis=(0, 1)), (200, 30, 10), atol=3)
    np.testing.assert_allclose(decoded.pixels[25:].mean(axis=(0, 1)), 0, atol=3)


def test_a_plan_comes_back_by_kind_and_in_order(folder: Path) -> None:
    plan = MediaPlan(
        items=(
            MediaItem(kind="audio", uri="tone.wav"),
            MediaItem(kind="video", uri="clip.mp4", frames=2),
            MediaItem(kind="video", uri="silent.mp4", frames=4),
            MediaItem(kind="audio", uri=f"file://{folder}/clip.mp4"),
        )
    )
    media = loader(folder).load_plan(plan)
    assert [v.frames.shape[0] for v in media.videos] == [2, 4]
    assert [round(peak_hertz(a)) for a in media.audios] == [1_000, 440]
    assert media.images == ()


def test_file_urls_are_unescaped() -> None:
    assert resolve_uri("file:///data/a%20b.mp4", Path("/base")) == Path("/data/a b.mp4")
    assert resolve_uri("a%20b.mp4", Path("/base")) == Path("/base/a%20b.mp4")


@pytest.mark.parametrize(
    "uri", ["https://host/clip.mp4", "s3://bucket/clip.mp4", "gs://bucket/clip.mp4"]
)
def test_remote_media_are_refused_with_a_remedy(folder: Path, uri: str) -> None:
    with pytest.raises(DataError, match=rf"{uri}: .*download"):
        video(folder, uri=uri)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"kind": "video", "uri": "absent.mp4"}, r"absent\.mp4: no such file.*media_root"),
        ({"kind": "video", "uri": "."}, r"not a file"),
        ({"kind": "video", "uri": "empty.mp4"}, r"empty\.mp4: is empty \(0 bytes\)"),
        ({"kind": "video", "uri": "noise.mp4"}, r"noise\.mp4: cannot be decoded"),
        ({"kind": "audio", "uri": "noise.wav"}, r"noise\.wav: cannot be decoded"),
        ({"kind": "image", "uri": "noise.png"}, r"noise\.png: not a readable image"),
        ({"kind": "video", "uri": "tone.wav"}, r"tone\.wav: has no video stream"),
        ({"kind": "audio", "uri": "silent.mp4"}, r"silent\.mp4: has no audio stream"),
        ({"kind": "audio", "uri": "nothing.wav"}, r"nothing\.wav: lasts 0 s"),
        (
            {"kind": "video", "uri": "clip.mp4", "clip": (1, 9)},
            r"clip \[1, 9\) s runs past the end at 3\.000 s",
        ),
        ({"kind": "video", "uri": "clip.mp4", "clip": (3.1, 3.2)}, r"runs past the end"),
        ({"kind": "audio", "uri": "tone.wav", "clip": (1, 9)}, r"runs past the end at 2\.000 s"),
        ({"kind": "audio", "uri": "clip.mp4", "clip": (1, 9)}, r"runs past the end at 3\.0\d+ s"),
        (
            {"kind": "video", "uri": "clip.mp4", "digest": "0" * 64},
            r"clip\.mp4: its sha256 .* fetch it again",
        ),
    ],
)
def test_bad_media_name_the_file_and_the_remedy(
    folder: Path, tmp_path: Path, item: dict[str, object], message: str
) -> None:
    for name in ("clip.mp4", "silent.mp4", "tone.wav"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "empty.mp4").touch()
    noise = np.random.default_rng(0).bytes(4_096)
    for name in ("noise.mp4", "noise.wav", "noise.png"):
        (tmp_path / name).write_bytes(noise)
    write_wav(tmp_path / "nothing.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(DataError, match=message):
        loader(tmp_path).load(MediaItem.model_validate(item))


def test_a_clip_without_a_sound_track_hears_silence_where_that_is_asked_for(folder: Path) -> None:
    quiet = MediaLoader(MediaConfig(missing_sound="silence"), folder)
    item = MediaItem(kind="audio", uri="silent.mp4", clip=(0.1, 0.4))
    sound = quiet.load(item)
    assert isinstance(sound, DecodedAudio)
    assert sound.samples.shape == (4_800,) and not sound.samples.any()
    assert quiet.address(item) != loader(folder).address(item)
    with pytest.raises(DataError, match=r"runs past the end .*window_slack"):
        quiet.load(item.model_copy(update={"clip": (0.1, 9.0)}))
    heard = MediaItem(kind="audio", uri="clip.mp4")
    np.testing.assert_array_equal(
        quiet.load(heard).samples,  # type: ignore[union-attr]
        loader(folder).load(heard).samples,  # type: ignore[union-attr]
    )


def test_a_video_cut_short_or_damaged_is_an_error(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "silent.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(whole[: len(whole) // 2])  # the index at its end is gone
    with pytest.raises(DataError, match="cannot be decoded"):
        video(tmp_path, frames=4)
    start = whole.index(b"mdat") + 4
    (tmp_path / "other.mp4").write_bytes(whole[:start] + bytes(len(whole) - start))
    with pytest.raises(DataError, match=r"other\.mp4"):
        video(tmp_path, uri="other.mp4", frames=4)


def test_digest_is_checked_and_a_changed_file_is_noticed(folder: Path, tmp_path: Path) -> None:
    media = loader(tmp_path)
    path = write_wav(tmp_path / "a.wav", tone(300, 1, 16_000), 16_000)
    item = MediaItem(
        kind="audio", uri="a.wav", digest=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    first = media.load(item)
    assert media.load(item).samples is first.samples  # type: ignore[union-attr]  # from memory, not decoded again
    write_wav(path, tone(900, 1.5, 16_000), 16_000)
    with pytest.raises(DataError, match="sha256"):
        media.load(item)
    changed = media.load(item.model_copy(update={"digest": None}))
    assert isinstance(changed, DecodedAudio) and peak_hertz(changed) == pytest.approx(900, abs=1)


def test_decoded_arrays_cannot_be_written_through_the_cache(folder: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        video(folder, frames=2).frames[0] = 0


def test_memory_cache_drops_the_least_recently_used() -> None:
    cache = MemoryCache(limit=300)
    for key in "abc":
        cache.put(key, Entry(np.zeros(100, np.uint8), 1.0, 1.0))
    assert cache.get("a") is not None  # now "b" is the oldest
    cache.put("d", Entry(np.zeros(150, np.uint8), 1.0, 1.0))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "d"]
    cache.put("e", Entry(np.zeros(301, np.uint8), 1.0, 1.0))  # larger than the whole cache
    assert cache.get("e") is None and cache.bytes == 250 and len(cache) == 2


def test_disk_cache_serves_another_process_and_survives_damage(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "cache"
    first = video(folder, loader(folder, disk_cache=disk), frames=6)
    (entry,) = disk.glob("*.npy")
    other = loader(folder, disk_cache=disk)  # its own, empty memory
    cached = other.disk.get(entry.stem) if other.disk is not None else None
    assert cached is not None
    np.testing.assert_array_equal(cached.array, first.frames)
    again = video(folder, other, frames=6)
    np.testing.assert_array_equal(again.frames, first.frames)
    assert (again.fps, again.duration) == (first.fps, first.duration)
    entry.write_bytes(entry.read_bytes()[:500])
    with caplog.at_level(logging.WARNING):
        mended = video(folder, loader(folder, disk_cache=disk), frames=6)
    np.testing.assert_array_equal(mended.frames, first.frames)
    assert "damaged" in caplog.text


def test_disk_cache_drops_the_least_recently_used_and_recounts_a_lost_count(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=4_000)
    for key in ("a", "b", "c"):
        cache.put(
            key, Entry(np.zeros(1_000, np.uint8), 1.0, 1.0)
        )  # about 1.3 kB each with its headers
    (tmp_path / "bytes").write_text("")  # a writer killed half-way
    os.utime(tmp_path / "b.npy", (1, 1))
    cache.put("d", Entry(np.zeros(1_000, np.uint8), 1.0, 1.0))
    assert sorted(path.stem for path in tmp_path.glob("*.npy")) == ["a", "c", "d"]
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    assert int((tmp_path / "bytes").read_text()) == stored <= 4_000
    cache.put("huge", Entry(np.zeros(5_000, np.uint8), 1.0, 1.0))
    assert cache.get("huge") is None and not list(tmp_path.glob("*.tmp"))


def test_threads_share_one_loader(folder: Path, tmp_path: Path) -> None:
    media = loader(folder, disk_cache=tmp_path, memory_cache_bytes=40_000)
    wanted = [2, 4, 6, 8] * 6
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda frames: video(folder, media, frames=frames), wanted))
    assert [result.frames.shape[0] for result in results] == wanted
    for frames in (2, 4, 6, 8):
        same = [r.frames for r in results if r.frames.shape[0] == frames]
        assert all(np.array_equal(same[0], other) for other in same)


def test_a_disk_cache_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(
        DataError, match=r"taken: the media cache cannot be made .*media\.disk_cache"
    ):
        loader(tmp_path, disk_cache=tmp_path / "taken")


def test_a_disk_cache_that_cannot_be_written_is_given_up_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: DiskCache, key: str, entry: Entry) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskCache, "put", full)
    media = loader(folder, disk_cache=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert video(folder, media, frames=2).frames.shape[0] == 2
    assert "No space left" in caplog.text and media.disk is None


def test_media_are_confined_to_declared_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    config = {"roots": [str(inside)]}
    confined = loader(inside, **config)
    assert confined.load(MediaItem(kind="image", uri="a.png"))
    for uri in ("link.png", "../outside/a.png", str(outside / "a.png")):
        assert loader(inside).load(MediaItem(kind="image", uri=uri))
        with pytest.raises(InputError, match=r"lies outside data\.media\.roots"):
            confined.load(MediaItem(kind="image", uri=uri))
