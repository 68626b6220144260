"""Media entries as datasets write them, turned into media items with a decode plan."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from avatar_rl.common.errors import InputError
from avatar_rl.common.files import replaced_file
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.readers.rows import Value, Values
from avatar_rl.prompts.record import MediaItem, Modality

KINDS: tuple[Modality, ...] = get_args(Modality)

#: Keys of a media entry (Qwen's, ours) and the MediaItem field each one sets.
_KEYS = {
    "fps": "fps",
    "nframes": "frames",
    "frames": "frames",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "sample_rate": "sample_rate",
    "sampling_rate": "sample_rate",
    "digest": "digest",
    "clip": "clip",
}
_NOT_OF: dict[Modality, tuple[str, ...]] = {
    "video": ("sample_rate",),
    "audio": ("fps", "frames", "min_pixels", "max_pixels"),
    "image": ("fps", "frames", "clip", "sample_rate"),
}
_PATH_KEYS = ("path", "uri", "url", "file")
_DATA_URL = re.compile(r"(?i)data:[^,]{0,200},")
_LONGEST_PATH = 2048
_MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"RIFF": ".wav",
    b"fLaC": ".flac",
    b"OggS": ".ogg",
}


def media_item(entry: Value, kind: Modality, config: DataConfig, where: str) -> MediaItem:
    """One medium from a path or a dict (``{"video": path, "fps": 2, "video_start": 1.0}``,
    ``{"bytes": ...}``)."""
    fields: dict[str, Value | tuple[Value, Value]] = {"kind": kind}
    if isinstance(entry, str):
        fields["uri"] = _path(entry, kind, config, where)
    elif isinstance(entry, dict):
        values: Values = {
            key: value
            for key, value in entry.items()
            if value is not None and key not in ("type", "text")
        }
        fields["uri"] = _uri(values, kind, config, where)
        if kind == "image" and {"video_start", "video_end"} & values.keys():
            raise InputError(where, "image entry has a window in time", "remove it")
        start, end = values.pop("video_start", None), values.pop("video_end", None)
        if end is not None:
            fields["clip"] = (start or 0.0, end)
        elif start is not None:
            raise InputError(
                where, f"{kind} names video_start without video_end", "give both, in seconds"
            )
        for key, value in values.items():
            if key not in _KEYS:
                raise InputError(
                    where,
                    f"{kind} entry has the unknown key {key!r}",
                    f"remove it; known are {sorted(_KEYS)}",
                )
            if _KEYS[key] in _NOT_OF[kind]:
                raise InputError(
                    where, f"{kind} entry has {key!r}, which no {kind} has", "remove it"
                )
            fields[_KEYS[key]] = value
        if {"frames", "fps"} <= fields.keys():
            raise InputError(
                where, f"{kind} entry names both a number of frames and fps", "keep one of them"
            )
    else:
        raise InputError(
            where,
            f"{kind} is given as a {type(entry).__name__}",
            "give a path; frame lists are not read, make a video",
        )
    try:
        return MediaItem.model_validate(fields)
    except ValidationError as error:
        raise InputError(
            where, f"{kind} entry: {_first(error)}", "correct the media entry"
        ) from error


def with_defaults(item: MediaItem, config: DataConfig) -> MediaItem:
    """``item`` with the decode settings it leaves open taken from ``config``."""
    given = item.model_fields_set
    update: Values = {}
    if item.kind == "audio":
        update = {"sample_rate": config.sample_rate}
    else:
        update = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
        if item.kind == "image" and config.image_max_pixels is not None:
            update["max_pixels"] = config.image_max_pixels
        if item.kind == "video" and not given & {"frames", "fps"}:
            update |= {"frames": config.frames, "fps": config.fps}
    return item.model_copy(update={key: value for key, value in update.items() if key not in given})


def _uri(values: Values, kind: Modality, config: DataConfig, where: str) -> str:
    """Takes the path (or the embedded bytes) out of ``values``."""
    found = [
        values.pop(key)
        for key in (kind, f"{kind}_url", f"{kind}_path", *_PATH_KEYS)
        if key in values
    ]
    embedded = values.pop("bytes", None)
    paths: list[Value] = []
    for value in found:
        if isinstance(value, dict):  # {"image": {"bytes": ..., "path": ...}}, {"image_url": {...}}
            embedded = embedded or value.get("bytes")
            value = next((value[key] for key in _PATH_KEYS if value.get(key)), None)
        paths.append(value)
    if embedded is not None:
        return _extract(embedded, kind, config, where)
    if not paths or not isinstance(paths[0], str) or not paths[0]:
        raise InputError(
            where,
            f"{kind} entry without a path",
            "give its path; frame lists are not read, make a video",
        )
    return _path(paths[0], kind, config, where)


def _path(text: str, kind: Modality, config: DataConfig, where: str) -> str:
    """A path as it stands; a data URL's content is written to a file. Raises InputError for base64
    text that is no path."""
    if _DATA_URL.match(text):
        head, _, body = text.partition(",")
        if config.extract_to is None or not head.endswith(";base64"):
            raise InputError(
                where,
                f"{kind} is embedded in the row as a data URL ({len(text)} characters)",
                "set data.reader.extract_to to a folder to write it to"
                if head.endswith(";base64")
                else "give it as base64 (data:...;base64,...), or as a path",
            )
        try:
            return _extract(base64.b64decode(body, validate=True), kind, config, where)
        except binascii.Error as error:
            raise InputError(
                where, f"{kind} is a data URL with broken base64 ({error})", "encode it again"
            ) from error
    if len(text) > _LONGEST_PATH:
        raise InputError(
            where,
            f"{kind} holds {len(text)} characters, which is no path: it seems to be base64 text",
            "give a path, or a data URL (data:video/mp4;base64,...) with data.reader.extract_to",
        )
    return text


def _extract(content: Value, kind: Modality, config: DataConfig, where: str) -> str:
    """Writes media embedded in a row to a file named by its content; returns the path."""
    if config.extract_to is None:
        raise InputError(
            where,
            f"{kind} is embedded in the row",
            "set data.reader.extract_to to a folder to write it to",
        )
    if not isinstance(content, bytes):
        raise InputError(
            where,
            f"{kind} has its bytes as a {type(content).__name__}",
            "give a path, or use parquet",
        )
    suffix = next((suffix for magic, suffix in _MAGIC.items() if content.startswith(magic)), ".bin")
    folder: Path = config.extract_to.absolute()
    path = folder / f"{hashlib.sha256(content).hexdigest()}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as beside:
            beside.write_bytes(content)
    return str(path)


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg']}" if place else detail["msg"]
