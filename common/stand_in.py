"""What lies in the place of a file: a pointer, a web page, an archive."""

from __future__ import annotations

from pathlib import Path

_HEAD_BYTES = 512
_ARCHIVES = {
    b"\x1f\x8b\x08": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}


def stand_in(path: Path) -> tuple[str, str] | None:
    """What is wrong with ``path`` and what to do, where it holds something else in the place of
    data; None where nothing of the kind is seen. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself", "fetch it (git lfs pull)"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself", "download the file behind it, signed in if due"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"is packed ({name})", "unpack it"
    return None
