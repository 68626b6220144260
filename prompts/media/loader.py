"""Media of a prompt as arrays: opened by path, checked, decoded and cached (docs/architecture.md).

    loader = MediaLoader(MediaConfig(), base=dataset_path.parent)
    media = loader.load_plan(prompt.media)      # media.videos[0].frames: uint8 (F, H, W, 3)

Rollout and learner side use the same loader, hence see the same pixels and samples. Arrays are
read-only: they are shared through the cache."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from avatar_rl.common.errors import AvatarError, InputError
from avatar_rl.common.files import sha256_of
from avatar_rl.common.stand_in import stand_in
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.media.cache import DiskCache, Entry, MemoryCache
from avatar_rl.prompts.media.decode import (
    NoSoundError,
    Sampling,
    decode_audio,
    decode_video,
    silence,
)
from avatar_rl.prompts.media.image import decode_image
from avatar_rl.prompts.record import MediaItem, MediaPlan, check_roots, resolve_uri

log = logging.getLogger(__name__)

_DECODER_VERSION = 3  # part of every cache key: raise it when decoding gives other values


@dataclass(frozen=True)
class DecodedVideo:
    """F sampled frames; F is even."""

    frames: NDArray[np.uint8]  # (F, H, W, 3) RGB
    fps: float  # rate of the sampled frames, F / duration
    duration: float  # seconds of the clip


@dataclass(frozen=True)
class DecodedAudio:
    """S mono samples."""

    samples: NDArray[np.float32]  # (S,)
    sample_rate: int  # Hz

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples.size / self.sample_rate


@dataclass(frozen=True)
class DecodedImage:
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB


Decoded = DecodedVideo | DecodedAudio | DecodedImage


@dataclass(frozen=True)
class DecodedMedia:
    """All media of a plan, each kind in the plan's order."""

    videos: tuple[DecodedVideo, ...] = ()
    audios: tuple[DecodedAudio, ...] = ()
    images: tuple[DecodedImage, ...] = ()


class MediaLoader:
    """Decodes media items through a bounded, content-addressed cache. Safe to use from several
    threads.

    ``base`` is the folder that relative URIs start from: the dataset's, or DataConfig.media_root.
    """

    def __init__(self, config: MediaConfig, base: Path) -> None:
        self.config = config
        self.base = base
        self.memory = MemoryCache(config.memory_cache_bytes)
        self.disk: DiskCache | None = None
        if config.disk_cache is not None:
            try:
                self.disk = DiskCache(config.disk_cache, config.disk_cache_bytes)
            except OSError as error:
                what = f"the media cache cannot be made there ({error.strerror})"
                raise InputError(
                    config.disk_cache,
                    what,
                    "set data.media.disk_cache to a writable folder or null",
                ) from error
        self._digests: dict[tuple[str, int, int, int], str] = {}
        self._lock = threading.Lock()

    def load(self, item: MediaItem) -> Decoded:
        """The decoded item. Raises DataError naming the file: missing, empty, corrupt, changed, out
        of its bounds."""
        path = resolve_uri(item.uri, self.base)
        check_roots(path, self.config.roots)
        key = self._key(self._digest(path, item), item)
        entry = self.memory.get(key)
        if entry is None:
            disk = self.disk  # another thread may give it up meanwhile
            entry = disk.get(key) if disk is not None else None
            if entry is None:
                try:
                    entry = self._decode(path, item)
                except AvatarError as error:
                    if (found := stand_in(path)) is not None:
                        raise InputError(path, *found) from error
                    raise
                except (
                    Exception
                ) as error:  # the decoders meet files that nobody foresaw, and fail in as many ways
                    raise InputError(
                        path,
                        f"cannot be decoded ({type(error).__name__}: {error})",
                        "correct the item's settings (clip, frames, fps, sample_rate), or "
                        "re-encode the file",
                    ) from error
                if disk is not None:
                    self._write(disk, key, entry)
            self.memory.put(key, entry)
        array = entry.array if item.kind not in self.config.blank else _blank(entry.array)
        if item.kind == "video":
            return DecodedVideo(array, entry.rate, entry.duration)
        if item.kind == "audio":
            return DecodedAudio(array, int(entry.rate))
        return DecodedImage(array)

    def address(self, item: MediaItem) -> str:
        """Content address of what ``load`` returns, without decoding: equal addresses mean equal
        values. Raises DataError where the file is missing, empty or changed."""
        path = resolve_uri(item.uri, self.base)
        check_roots(path, self.config.roots)
        key = self._key(self._digest(path, item), item)
        return f"{key}-blank" if item.kind in self.config.blank else key

    def load_plan(self, plan: MediaPlan) -> DecodedMedia:
        """Every item of ``plan``. Raises DataError as ``load`` does."""
        loaded = [self.load(item) for item in plan.items]
        return DecodedMedia(
            tuple(media for media in loaded if isinstance(media, DecodedVideo)),
            tuple(media for media in loaded if isinstance(media, DecodedAudio)),
            tuple(media for media in loaded if isinstance(media, DecodedImage)),
        )

    def _digest(self, path: Path, item: MediaItem) -> str:
        """The file's sha256, hashed once per version of the file and compared with the item's."""
        try:
            status = path.stat()
            if not path.is_file():
                raise InputError(path, "not a file", f"correct the media path {item.uri!r}")
            if status.st_size == 0:
                raise InputError(path, "is empty (0 bytes)", "download it again or drop the row")
            version = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
            digest = self._digests.get(version)
            if digest is None:
                digest = sha256_of(path)
                with self._lock:
                    self._digests[version] = digest
        except FileNotFoundError as error:
            raise InputError(
                path,
                "no such file",
                f"{item.uri!r} is taken relative to {self.base}: fetch the media, or set "
                "data.reader.media_root",
            ) from error
        except OSError as error:
            remedy = "correct the media path"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
                remedy = "check the file's permissions and its disk"
            raise InputError(path, f"cannot be read ({error.strerror})", remedy) from error
        if item.digest is not None and item.digest.lower() != digest:
            raise InputError(
                path,
                f"its sha256 {digest} is not the {item.digest} that the dataset promises",
                "it was changed or cut short: fetch it again, or rebuild the dataset",
            )
        return digest

    def _key(self, digest: str, item: MediaItem) -> str:
        """Content address: the file's bytes and everything that the decoded values depend on."""
        plan = item.model_dump(mode="json", exclude={"uri", "digest"})
        limits = self.config.model_dump(include={"fps", "max_frames", "max_pixels", "window_slack"})
        if item.kind == "audio" and self.config.missing_sound == "silence":
            limits["missing_sound"] = "silence"
        text = json.dumps([_DECODER_VERSION, digest, plan, limits], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _decode(self, path: Path, item: MediaItem) -> Entry:
        config = self.config
        # max_pixels bounds what is kept; min_pixels is left to the processor, enlarging here would
        # only cost memory
        pixels = item.max_pixels or config.max_pixels
        entry: Entry
        if item.kind == "image":
            entry = Entry(decode_image(path, max_pixels=pixels), 0.0, 0.0)
        elif item.kind == "audio":
            entry = Entry(*self._sound(path, item))
        else:
            sampling = Sampling(item.frames, item.fps or config.fps, config.max_frames)
            entry = Entry(
                *decode_video(
                    path,
                    clip=item.clip,
                    sampling=sampling,
                    max_pixels=pixels,
                    slack=config.window_slack,
                    threads=config.threads,
                )
            )
        entry.array.setflags(write=False)
        return entry

    def _sound(self, path: Path, item: MediaItem) -> tuple[NDArray[np.float32], float, float]:
        """Samples, their rate and seconds."""
        rate, slack = item.sample_rate, self.config.window_slack
        try:
            found = decode_audio(path, clip=item.clip, sample_rate=rate, slack=slack)
        except NoSoundError:
            if self.config.missing_sound == "refuse":
                raise
            found = silence(path, clip=item.clip, sample_rate=rate, slack=slack)
        samples, duration = found
        return samples, float(rate), duration

    def _write(self, disk: DiskCache, key: str, entry: Entry) -> None:
        """Offer ``entry`` to the disk level, which is an aid: a full disk slows a run down, it does
        not end it."""
        try:
            disk.put(key, entry)
        except OSError as error:
            log.warning(
                "media cache %s cannot be written (%s): continuing without it", disk.folder, error
            )
            self.disk = None


def has_sound(path: Path) -> bool:
    """Whether a file has a sound track. One that cannot be opened has none here: what it belongs to
    is refused with the reason when it is decoded."""
    try:
        with av.open(str(path)) as container:
            return bool(container.streams.audio)
    except (av.error.FFmpegError, OSError):
        return False


def _blank(array: NDArray[Any]) -> NDArray[Any]:
    """Silence or black of the same shape."""
    empty = np.zeros_like(array)
    empty.setflags(write=False)
    return empty
