"""A prompt's frames and sound as OpenAI content parts, whole or cut to a segment (docs/method.md
1.5, 2.1)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.media.decode import PastEndError
from avatar_rl.prompts.media.loader import DecodedAudio, DecodedImage, DecodedVideo, MediaLoader
from avatar_rl.prompts.record import MediaItem, Modality, Prompt
from avatar_rl.rewards.answers.grounding import Segment
from avatar_rl.rewards.judges.base import ContentPart


@dataclass(frozen=True)
class Clip:
    """A segment, and the prompt with its video and sound cut down to it."""

    segment: Segment
    prompt: Prompt


def cut(prompt: Prompt, segment: Segment) -> Clip:
    """Windows in seconds of the prompt's own clips; images stay whole. What lies outside the media
    fails at loading."""
    items = tuple(
        item if item.kind == "image" else _window(item, segment) for item in prompt.media.items
    )
    media = prompt.media.model_copy(update={"items": items})
    return Clip(segment, prompt.model_copy(update={"media": media}))


def _window(item: MediaItem, segment: Segment) -> MediaItem:
    start, end = item.clip or (0.0, float("inf"))
    window = (start + segment.start, min(start + segment.end, end))
    # beyond its own clip nothing is left of it: kept as asked, so that the loader refuses it with
    # its reason
    return item.model_copy(
        update={"clip": window if window[0] < window[1] else (start + segment.start, end + 3600.0)}
    )


class MediaAttach:
    """``attach`` hook of the judge: decodes through a bounded cache, at most ``frames`` frames per
    prompt.

    Called from threads. Raises DataError as the media loader does.
    """

    def __init__(self, config: MediaConfig, kinds: Sequence[Modality], *, frames: int) -> None:
        self._loader = MediaLoader(config, base=Path("."))
        self._kinds, self._frames = tuple(kinds), frames

    def __call__(self, prompt: Prompt) -> list[ContentPart]:
        """Parts in the order of the prompt's media; kinds that are not attached are left out.

        So is sound that ends before its window, as tracks may, where there are frames to go by.
        """
        items = [item for item in prompt.media.items if item.kind in self._kinds]
        videos = sum(item.kind == "video" for item in items)
        parts: list[ContentPart] = []
        for item in items:
            try:
                media = self._loader.load(item)
            except PastEndError:
                if item.kind == "audio" and videos:
                    continue
                raise
            if isinstance(media, DecodedVideo):
                parts += [
                    image_part(frame)
                    for frame in _spread(media.frames, max(1, self._frames // videos))
                ]
            elif isinstance(media, DecodedImage):
                parts.append(image_part(media.pixels))
            elif isinstance(media, DecodedAudio):
                parts.append(audio_part(media))
        return parts


def image_part(pixels: NDArray[np.uint8]) -> ContentPart:
    """(H, W, 3) RGB as a JPEG data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_text(buffer)}"}}


def audio_part(audio: DecodedAudio) -> ContentPart:
    """Mono samples as a 16-bit WAV."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, audio.samples, audio.sample_rate, format="WAV", subtype="PCM_16")
    return {"type": "input_audio", "input_audio": {"data": _text(buffer), "format": "wav"}}


def _text(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode()


def _spread(frames: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """At most ``count`` of (F, H, W, 3) frames: the middles of equal parts."""
    if len(frames) <= count:
        return frames
    return frames[[int((i + 0.5) * len(frames) / count) for i in range(count)]]
