"""Files that a decoder trips over, or shows wrongly: one of them costs its prompt, never the
run."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from avatar_rl.common.errors import InputError
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.media.decode import PastEndError, Timeline, _timeline
from avatar_rl.prompts.media.loader import (
    Decoded,
    DecodedAudio,
    DecodedImage,
    DecodedVideo,
    MediaLoader,
)
from avatar_rl.prompts.record import MediaItem
from tests.unit.media_files import tone, write_video, write_wav

RED, BLUE = (200, 30, 10), (10, 30, 200)


def load(path: Path, kind: str, **item: Any) -> Decoded:
    loader = MediaLoader(MediaConfig(), path.parent)
    return loader.load(MediaItem.model_validate({"kind": kind, "uri": path.name, **item}))


def test_a_title_that_is_not_utf8_does_not_matter(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [RED] * 4, sound=tone(440, 0.5, 48_000))
    named = path.read_bytes()
    assert named.count(b"Lavf") == 1  # the muxer's name, in a tag like the title
    path.write_bytes(named.replace(b"Lavf", "été!".encode("latin-1")))
    decoded = load(path, "video", frames=4)
    assert isinstance(decoded, DecodedVideo) and decoded.frames.shape == (4, 48, 64, 3)
    assert isinstance(load(path, "audio"), DecodedAudio)


def test_a_video_that_changes_its_frame_size_is_refused_where_it_does(tmp_path: Path) -> None:
    wide = write_video(tmp_path / "wide.h264", [RED] * 8)
    tall = write_video(tmp_path / "tall.h264", [BLUE] * 8, size=(32, 80))
    path = tmp_path / "joined.h264"
    path.write_bytes(wide.read_bytes() + tall.read_bytes())
    with pytest.raises(
        InputError, match=r"joined\.h264: changes its frame size .*32 x 80, 64 x 48.*re-encode"
    ):
        load(path, "video", frames=8)
    first = load(path, "video", frames=2, clip=(0.0, 0.2))
    assert isinstance(first, DecodedVideo) and first.frames.shape == (2, 48, 64, 3)


def test_a_rate_without_bound_is_no_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [RED] * 4)
    with pytest.raises(ValidationError, match=r"fps\n.*finite"):
        load(path, "video", fps=float("inf"))
    found = load(path, "video", fps=1e308)
    assert isinstance(found, DecodedVideo) and len(found.frames) == 4


def test_a_codec_that_nobody_knows_names_the_file(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "odd.wav", tone(440, 0.5, 16_000), 16_000)
    header = bytearray(path.read_bytes())
    header[20:22] = b"\xee\xee"  # format tag
    path.write_bytes(bytes(header))
    with pytest.raises(InputError, match=r"odd\.wav: cannot be decoded"):
        load(path, "audio")


def test_a_flac_file_damaged_behind_its_header_names_the_file(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "odd.flac", tone(440, 0.5, 16_000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * (len(whole) // 2))
    with pytest.raises(InputError, match=r"odd\.flac: cannot be decoded"):
        load(path, "audio", clip=(0.4, 0.5))


def test_sound_past_its_end_is_told_apart_and_survives_pickling(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [RED] * 24, sound=tone(440, 1, 48_000))
    with pytest.raises(PastEndError, match=r"no sound in \[2, 3\) s") as caught:
        load(path, "audio", clip=(2.0, 3.0))
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is PastEndError and str(again) == str(caught.value)


def transparent(mode: str) -> Image.Image:
    """8 x 8 pixels, opaque on the left, transparent on the right, where black or red lies under
    it."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :4] = 255
    if mode == "LA":
        return Image.merge("LA", [Image.new("L", (8, 8), 100), Image.fromarray(alpha)])
    image = Image.new("RGB", (8, 8), RED)
    image.paste((0, 0, 0), (4, 0, 8, 8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(alpha))
        return image
    palette = image.quantize(2)
    palette.info["transparency"] = int(palette.getpixel((7, 0)))  # type: ignore[arg-type]
    return palette


@pytest.mark.parametrize(("mode", "left"), [("RGBA", RED), ("LA", (100, 100, 100)), ("P", RED)])
def test_what_is_transparent_is_white(
    tmp_path: Path, mode: str, left: tuple[int, int, int]
) -> None:
    image = transparent(mode)
    assert image.mode == mode
    image.save(tmp_path / "logo.png")
    decoded = load(tmp_path / "logo.png", "image")
    assert isinstance(decoded, DecodedImage)
    np.testing.assert_array_equal(decoded.pixels[:, :4], np.full((8, 4, 3), left))
    np.testing.assert_array_equal(decoded.pixels[:, 4:], 255)


def test_frame_times_are_read_without_keeping_the_file_in_memory(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [RED] * 24)
    alive: list[int] = []
    with av.open(str(path)) as container:

        def demux(stream: av.VideoStream) -> Iterator[av.Packet]:
            yield from container.demux(stream)
            alive.append(sum(type(thing) is av.Packet for thing in gc.get_objects()))

        watched: Any = SimpleNamespace(
            streams=container.streams, start_time=container.start_time, demux=demux
        )
        line: Timeline = _timeline(watched, path)
    assert alive[0] <= 3 and len(line.ticks) == 24
