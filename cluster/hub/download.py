"""Files of a snapshot on this disk: whole and with the right checksum, or not there.

A file that a kill left half fetched continues where it was. The hub's library throws such parts
away and compares sizes only, so its download function is used and the rest is done here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from avatar_rl.cluster.hub.snapshot import HubFile, Snapshot, check_space, named_errors
from avatar_rl.common.errors import DataError
from avatar_rl.common.files import replace_text

#: In the folder of a dataset: what was fetched whole, so that nothing is read again to know it.
LEDGER = ".fetched.json"

Advance = Callable[[HubFile, int, int], None]  # file, its number from 1, of how many


class Ledger:
    """path -> [checksum, size, modification time in ns] of the files that are here whole."""

    def __init__(self, root: Path) -> None:
        self._path = root / LEDGER
        self._root = root
        try:
            self._known: dict[str, list[str | int]] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def has(self, file: HubFile) -> bool:
        path = self._root / file.path
        return path.is_file() and self._known.get(file.path) == self._entry(file, path)

    def add(self, file: HubFile) -> None:
        self._known[file.path] = self._entry(file, self._root / file.path)
        replace_text(self._path, json.dumps(self._known, indent=1, sort_keys=True) + "\n")

    @staticmethod
    def _entry(file: HubFile, path: Path) -> list[str | int]:
        found = path.stat()
        return [file.checksum, found.st_size, found.st_mtime_ns]


def download(snapshot: Snapshot, files: Sequence[HubFile], root: Path, advance: Advance) -> int:
    """Brings ``files`` to ``root``; returns how many were not there yet.

    Raises DataError naming the file: no space, a checksum that differs, a hub that fails. What is
    here by then stays."""
    for file in files:
        _check_path(file.path)
    root.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(root)
    for file in files:
        if not ledger.has(file) and _is_there(root / file.path, file):
            ledger.add(file)  # brought here by somebody else
    missing = [file for file in files if not ledger.has(file)]
    for file in missing:
        if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise DataError(
                f"{snapshot.repo}: {file.path} has {file.size / 1e9:,.0f} GB, more than a hub "
                f"gives out over plain HTTP: bring it to {root / file.path} by the hub's own tool, "
                "then fetch again; or leave it out with --only"
            )
    left = sum(file.size - _size(_part(root, file)) for file in missing)
    check_space(root, max(0, left), f"{snapshot.repo} ({len(missing)} files)")
    for number, file in enumerate(missing, start=1):
        advance(file, number, len(missing))
        with named_errors(snapshot.repo, snapshot.revision):
            _fetch(snapshot, file, root)
            ledger.add(file)
    return len(missing)


def _fetch(snapshot: Snapshot, file: HubFile, root: Path) -> None:
    target, part = root / file.path, _part(root, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(
        snapshot.repo,
        file.path,
        repo_type="dataset",
        revision=snapshot.commit,
        endpoint=snapshot.endpoint,
    )
    continued = 0 < _size(part) <= file.size
    if not continued:
        part.unlink(missing_ok=True)
    with part.open("ab") as out:
        http_get(
            url,
            out,
            resume_size=_size(part),
            headers=build_hf_headers(token=get_token() or False),
            expected_size=file.size,
        )
    if (found := checksum_of(part, file)) != file.checksum:
        part.unlink()
        if continued:  # what was there before may be what is wrong
            return _fetch(snapshot, file, root)
        raise DataError(
            f"{snapshot.repo}: {file.path} has the checksum {found[:16]}..., and the hub lists "
            f"{file.checksum[:16]}...: it came damaged and was removed; fetch again, or ask "
            "another HF_ENDPOINT"
        )
    part.replace(target)


def _is_there(path: Path, file: HubFile) -> bool:
    return _size(path) == file.size > 0 and checksum_of(path, file) == file.checksum


def checksum_of(path: Path, file: HubFile) -> str:
    """What ``file.checksum`` is of the file at ``path``."""
    with path.open("rb") as content:
        if file.sha256 is not None:
            return hashlib.file_digest(content, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % _size(path), usedforsecurity=False)
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _part(root: Path, file: HubFile) -> Path:
    """Where ``file`` grows. Its content is in the name: another commit's part is another file."""
    target = root / file.path
    return target.with_name(f".{target.name}.{file.checksum[:16]}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_path(path: str) -> None:
    """Raises DataError for a name that leaves the folder: names come from the hub."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise DataError(f"the hub lists a file {path!r} outside of its repository: not fetched")
