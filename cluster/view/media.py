"""The clips that a run's samples name: found, described, and made playable. Nothing else of the
disk is ever given out."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from avatar_rl.common.errors import AvatarError, InputError
from avatar_rl.common.types import Json, JsonObject
from avatar_rl.prompts.media.decode import Sampling, decode_audio, decode_video, streams_of
from avatar_rl.prompts.media.image import decode_image
from avatar_rl.prompts.record import MediaItem, resolve_uri

#: By suffix. Only these are ever read, whatever a sample names.
TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
    ".mpg": "video/mpeg",
    ".mpeg": "video/mpeg",
    ".ts": "video/mp2t",
    ".flv": "video/x-flv",
    ".wmv": "video/x-ms-wmv",
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".m4a": "audio/mp4",
    ".aac": "audio/aac",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
}
#: Pictures that browsers show as they are.
SHOWN_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
#: Frames where a sample does not say how many the model saw, and the most that are shown.
FRAMES, MOST_FRAMES = 8, 64
FRAME_PIXELS = 256 * 256
IMAGE_PIXELS = 1024 * 1024
WAV_RATE = 24_000
SLACK_S = 1.0  # a clip window may run past its file by this much
CACHED_ITEMS = 24


class MissingMediaError(InputError):
    """A file that a sample names is not there, or may not be given out."""


@dataclass(frozen=True)
class Clip:
    """A media item of a sample and its name in addresses."""

    key: str
    item: MediaItem

    @property
    def suffix(self) -> str:
        return Path(self.item.uri).suffix.lower()


def clip_of(raw: Json) -> Clip | None:
    """The clip of a sample's media entry; None where it is none."""
    try:
        item = MediaItem.model_validate(raw)
    except ValidationError:
        return None
    said = json.dumps(item.model_dump(mode="json"), sort_keys=True)
    return Clip(hashlib.sha256(said.encode()).hexdigest()[:20], item)


class MediaShelf:
    """Finds clips and keeps the last decoded ones. Thread-safe.

    ``places`` are folders to look in for a file that is not where the sample says; ``roots`` is
    ``data.media.roots`` of the run: nothing outside is given out where it is set."""

    def __init__(self, places: Sequence[Path] = ()) -> None:
        self.places = [place.resolve() for place in places]
        self._decoded: OrderedDict[tuple[str, str], list[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, clip: Clip, roots: Sequence[Path] = ()) -> Path:
        """The file. Raises MissingMediaError that says where it was looked for."""
        tried = list(self._candidates(clip))
        for path in tried:
            if path.is_file():
                return _checked(path, [*roots, *self.places] if roots else [])
        raise MissingMediaError(
            clip.item.uri,
            "is not there; looked at " + ", ".join(map(str, tried)),
            "give the folder where the media are now: --media FOLDER",
        )

    def _candidates(self, clip: Clip) -> Iterable[Path]:
        """Where the sample says; then below each place by ever shorter ends of that path."""
        named = resolve_uri(clip.item.uri, Path("/"))
        yield named
        parts = [part for part in named.parts[1:] if part not in ("..", ".")]
        for place in self.places:
            for start in range(max(0, len(parts) - 3), len(parts)):
                yield place.joinpath(*parts[start:])

    def describe(self, clip: Clip, roots: Sequence[Path] = ()) -> JsonObject:
        """What the page needs to know of a clip, found or not."""
        item = clip.item
        said: JsonObject = {
            "key": clip.key,
            "kind": item.kind,
            "uri": item.uri,
            "name": Path(item.uri).name,
            "clip": list(item.clip) if item.clip else None,
            "error": None,
            "suffix": clip.suffix,
        }
        try:
            path = self.find(clip, roots)
            said |= {"bytes": path.stat().st_size, **_streams(path, item)}
        except (AvatarError, OSError, ValueError) as error:
            said["error"] = str(error)
        if item.kind == "video":
            said["frames"] = min(item.frames or FRAMES, MOST_FRAMES)
            said["frames_exact"] = item.frames is not None and item.frames <= MOST_FRAMES
        return said

    def frames(self, clip: Clip, path: Path) -> list[bytes]:
        """The video's frames as the model saw them, or evenly spaced; of an image itself. JPEG.

        Raises InputError for a file that cannot be decoded."""
        return self._cached((clip.key, "frames"), lambda: _frames(clip.item, path))

    def wav(self, clip: Clip, path: Path) -> bytes:
        """The sound of a file, mono, for browsers that cannot play it. Raises InputError."""
        return self._cached((clip.key, "wav"), lambda: [_wav(clip.item, path)])[0]

    def _cached(self, name: tuple[str, str], make: Callable[[], list[bytes]]) -> list[bytes]:
        with self._lock:
            if name in self._decoded:
                self._decoded.move_to_end(name)
                return self._decoded[name]
        made = make()
        with self._lock:
            self._decoded[name] = made
            while len(self._decoded) > CACHED_ITEMS:
                self._decoded.popitem(last=False)
        return made


def _checked(path: Path, roots: Sequence[Path]) -> Path:
    """``path`` with links followed; refused where it is no media file, or outside ``roots``."""
    real = path.resolve()
    if {path.suffix.lower(), real.suffix.lower()} - TYPES.keys():
        raise MissingMediaError(path, "is no media file by its suffix", "it is not given out")
    if roots and not any(real.is_relative_to(root.resolve()) for root in roots):
        raise MissingMediaError(
            path, f"lies outside data.media.roots as {real}", "it is not given out"
        )
    return real


def _streams(path: Path, item: MediaItem) -> JsonObject:
    """Codecs and length as the container says."""
    if item.kind == "image":
        return {}
    found = streams_of(path)
    codecs: dict[str, Json] = {**found.codecs}
    return {"codecs": codecs, "duration": found.duration, "sound": "audio" in codecs}


def _frames(item: MediaItem, path: Path) -> list[bytes]:
    if item.kind == "image":
        return [_jpeg(decode_image(path, max_pixels=IMAGE_PIXELS))]
    frames, _, _ = decode_video(
        path,
        clip=item.clip,
        sampling=Sampling(min(item.frames or FRAMES, MOST_FRAMES), 1.0, MOST_FRAMES),
        max_pixels=min(item.max_pixels or FRAME_PIXELS, FRAME_PIXELS),
        slack=SLACK_S,
        threads=1,
    )
    return [_jpeg(frame) for frame in frames]


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _wav(item: MediaItem, path: Path) -> bytes:
    import soundfile

    samples, _ = decode_audio(path, clip=item.clip, sample_rate=WAV_RATE, slack=SLACK_S)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, WAV_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
