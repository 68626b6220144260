"""A run folder copied to an object store at the end of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from avatar_rl.common.errors import ConfigError, ResourceError

#: The append-only file of an embedded server: `avatar buffer export` is the portable form.
LEFT_OUT = ("redis",)


class FileSystem(Protocol):
    """What is used of fsspec's, which has no types."""

    def makedirs(self, path: str, exist_ok: bool) -> None: ...

    def put_file(self, local: str, remote: str) -> None: ...


def open_target(url: str) -> tuple[FileSystem, str]:
    """(file system, path) of an fsspec URL; ConfigError when its protocol is unknown or its package
    is missing."""
    import fsspec

    try:
        return cast(tuple[FileSystem, str], fsspec.core.url_to_fs(url))
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"output.upload: {url}: {error}; install the protocol's package, e.g. s3fs, gcsfs"
        ) from error


def upload(folder: Path, url: str) -> str:
    """Copies ``folder`` to ``url``/<its name>, one file after the other; returns the target's URL.

    Raises ResourceError naming the file that could not be written.
    """
    files, target = open_target(url)
    base = f"{target.rstrip('/')}/{folder.name}"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        part = file.relative_to(folder)
        if part.parts[0] in LEFT_OUT:
            continue
        place = f"{base}/{part.as_posix()}"
        try:
            files.makedirs(place.rpartition("/")[0], exist_ok=True)
            files.put_file(str(file), place)
        except Exception as error:  # each store has its own
            raise ResourceError(
                f"output.upload: {file} could not be written to {url}: {error}"
            ) from error
    return f"{url.rstrip('/')}/{folder.name}"
