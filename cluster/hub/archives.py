"""Archives of a dataset, unpacked beside themselves. Their members come from strangers."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from avatar_rl.cluster.hub.snapshot import check_space
from avatar_rl.common.errors import InputError
from avatar_rl.common.files import replace_text

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")


def is_archive(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def unpack(archive: Path) -> bool:
    """Unpacks ``archive`` into its folder; False where that was done before.

    Raises InputError for a damaged archive and for members that would lie outside of the folder,
    DataError where there is no room."""
    done = archive.with_name(f".{archive.name}.unpacked")
    stamp = f"{archive.stat().st_size} {archive.stat().st_mtime_ns}\n"
    if done.is_file() and done.read_text() == stamp:
        return False
    try:
        if archive.suffix.lower() == ".zip":
            _zip(archive)
        else:
            _tar(archive)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(
            archive, f"cannot be unpacked ({error})", "delete it and fetch again"
        ) from error
    replace_text(done, stamp)
    return True


def _zip(archive: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for one in members:
            parts = PurePosixPath(one.filename.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts:
                raise InputError(
                    archive, f"a member {one.filename!r} lies outside", "do not use this archive"
                )
        check_space(archive.parent, sum(one.file_size for one in members), archive.name)
        file.extractall(archive.parent)


def _tar(archive: Path) -> None:
    with tarfile.open(archive) as file:
        check_space(archive.parent, sum(one.size for one in file), archive.name)
        try:  # refuses what is absolute, leads outside, or is a device or a link to elsewhere
            file.extractall(archive.parent, filter="data")
        except tarfile.FilterError as error:
            raise InputError(archive, str(error), "do not use this archive") from error
