"""A scene as frames and sound, and as the bytes of an .mp4 and a .wav file."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from avatar_rl.prompts.synthetic.scene import (
    COLOURS,
    FRAMES,
    FRAMES_PER_SLOT,
    HEIGHT,
    NONE,
    PITCHES,
    SLOT_SECONDS,
    SLOTS,
    WIDTH,
    Scene,
    Sprite,
)

FPS = Fraction(FRAMES_PER_SLOT) / Fraction(SLOT_SECONDS).limit_denominator(100)  # 25/4 per second
SAMPLE_RATE = 16_000  # Hz
SIZE = 18  # pixels, edge of a square and diameter of a disc
CORE = 8  # pixels, edge of the white core of a lit shape
WALL = 4  # pixels
# The vision encoder knows patches only relative to each other, and time not at all: the walls tell
# left from right, a strip of sky that brightens from slot to slot tells early from late.
LEFT_WALL = (200, 120, 220)
RIGHT_WALL = (220, 220, 220)
SKY = 3  # pixels
SKY_STEP = 65  # brightness per slot
BEEP_SECONDS = 0.18

_ROWS, _COLUMNS = np.mgrid[:HEIGHT, :WIDTH] + 0.5


def render_frames(scene: Scene, rng: Generator, difficulty: float) -> NDArray[np.uint8]:
    """(FRAMES, HEIGHT, WIDTH, 3) RGB."""
    frames = np.full((FRAMES, HEIGHT, WIDTH, 3), rng.uniform(15, 45), np.float32)
    frames[:, :, :WALL] = LEFT_WALL
    frames[:, :, -WALL:] = RIGHT_WALL
    frames[:, :SKY] = (30 + SKY_STEP * (np.arange(FRAMES) // FRAMES_PER_SLOT))[:, None, None, None]
    for sprite in scene.sprites:
        shift = rng.uniform(-60, 60, 3) * difficulty
        y = HEIGHT / 2 + rng.uniform(-2, 2)
        for i, x in enumerate(sprite.path):
            colour = np.clip(
                np.array(COLOURS[sprite.colours[i // FRAMES_PER_SLOT]]) + shift, 0, 255
            )
            frames[i][_mask(sprite, x, y)] = colour
            if sprite.lit[i // FRAMES_PER_SLOT]:
                frames[i][(abs(_COLUMNS - x) < CORE / 2) & (abs(_ROWS - y) < CORE / 2)] = 255
    frames += rng.standard_normal(frames.shape, dtype=np.float32) * (30 * difficulty)
    return np.clip(frames, 0, 255).astype(np.uint8)


def _mask(sprite: Sprite, x: float, y: float) -> NDArray[np.bool_]:
    if sprite.form == "square":
        return (abs(_COLUMNS - x) < SIZE / 2) & (abs(_ROWS - y) < SIZE / 2)
    return (_COLUMNS - x) ** 2 + (_ROWS - y) ** 2 < (SIZE / 2) ** 2


def render_sound(scene: Scene, rng: Generator, difficulty: float) -> NDArray[np.int16]:
    """(SLOTS * SLOT_SECONDS * SAMPLE_RATE,) 16-bit mono samples."""
    slot = round(SLOT_SECONDS * SAMPLE_RATE)
    beep = round(BEEP_SECONDS * SAMPLE_RATE)
    wave = rng.standard_normal(SLOTS * slot) * (0.003 + 0.03 * difficulty)
    time, envelope = np.arange(beep) / SAMPLE_RATE, np.hanning(beep)
    for i, sound in enumerate(scene.sounds):
        if sound == NONE:
            continue
        hertz = PITCHES[sound] * (1 + rng.uniform(-0.2, 0.2) * difficulty)
        start = i * slot + (slot - beep) // 2 + round(rng.uniform(-0.03, 0.03) * SAMPLE_RATE)
        wave[start : start + beep] += (
            rng.uniform(0.25, 0.5) * envelope * np.sin(2 * np.pi * hertz * time)
        )
    return (np.clip(wave, -1, 1) * 32767).astype("<i2")


def encode_mp4(frames: NDArray[np.uint8]) -> bytes:
    """H.264 at FPS frames per second; the same bytes for the same frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1  # several threads may cut slices differently
        stream.codec_context.options = {"preset": "ultrafast", "crf": "16"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_wav(samples: NDArray[np.int16]) -> bytes:
    """16-bit PCM, mono, SAMPLE_RATE."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
