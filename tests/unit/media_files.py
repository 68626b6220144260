"""Real media files for tests: .mp4 with or without sound, .wav; written with PyAV and soundfile."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

Colour = tuple[int, int, int]


def tone(hertz: float, seconds: float, rate: int, amplitude: float = 0.5) -> NDArray[np.float32]:
    """(S,) sine."""
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def write_wav(path: Path, samples: NDArray[np.float32], rate: int) -> Path:
    soundfile.write(str(path), samples, rate)
    return path


def write_video(
    path: Path,
    colours: list[Colour],
    *,
    fps: int = 8,
    size: tuple[int, int] = (64, 48),
    gop: int = 4,
    sound: NDArray[np.float32] | None = None,
    sound_rate: int = 48_000,
) -> Path:
    """H.264 clip with one plain colour per frame (width, height = size), AAC sound track if
    given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "bf": "2"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        track = (
            container.add_stream("aac", rate=sound_rate, layout="mono")
            if sound is not None
            else None
        )
        for colour in colours:
            image = np.tile(np.array(colour, np.uint8), (size[1], size[0], 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = sound_rate, Fraction(1, sound_rate), 0
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return path


def mean_colours(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(F, 3) mean colour of frames (F, H, W, 3)."""
    return frames.reshape(frames.shape[0], -1, 3).mean(axis=1)
