"""`avatar data fetch`: a public dataset from the hub, checked, unpacked, and as rows that train."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.hub.archives import is_archive, unpack
from avatar_rl.cluster.hub.datasets import DATASETS, PublicDataset, dataset
from avatar_rl.cluster.hub.download import download
from avatar_rl.cluster.hub.rows import Written, write_rows
from avatar_rl.cluster.hub.snapshot import HubFile, Snapshot, open_snapshot
from avatar_rl.common.errors import DataError
from avatar_rl.common.files import replace_text

MANIFEST = "fetched.json"
_SHOWN = 3  # reasons for rows that were left out


def list_datasets() -> int:
    for one in DATASETS.values():
        print(f"{one.name:<14} {one.repo:<32} {one.what}")
    return 0


def fetch(name: str, revision: str, out: Path | None, only: Sequence[str]) -> int:
    """Fetches ``name`` to ``out``; a second time only what is missing. Raises AvatarError
    children."""
    chosen = dataset(name)
    root = (out or Path("data") / name.replace("/", "__")).resolve()
    snapshot = open_snapshot(chosen.repo, revision)
    files = [file for file in snapshot.files if _wanted(file, only)]
    if not files:
        raise DataError(
            f"{chosen.repo} has no file {' or '.join(only) or 'at all'}: there are "
            f"{', '.join(file.path for file in snapshot.files[:8])}"
        )
    size = sum(file.size for file in files)
    print(f"{chosen.repo} at {snapshot.commit}: {len(files)} files, {size / 1e6:,.1f} MB")
    fetched = download(snapshot, files, root, _say)
    for file in files:
        if is_archive(file.path) and unpack(root / file.path):
            print(f"unpacked       {file.path}")
    written = write_rows(chosen, root, required=not only)
    _record(chosen, snapshot, files, written, root)
    print(f"fetched        {fetched} files, {len(files) - fetched} were there")
    for one in written:
        _report(one)
    if chosen.note:
        print(f"note           {chosen.note}")
    print(f"to get the same again: --revision {snapshot.commit}")
    return 0


def _wanted(file: HubFile, only: Sequence[str]) -> bool:
    hidden = any(part.startswith(".") for part in file.path.split("/"))
    return not hidden and (not only or any(fnmatch.fnmatch(file.path, one) for one in only))


def _say(file: HubFile, number: int, total: int) -> None:
    print(
        f"fetching       {number} of {total}: {file.path} ({file.size / 1e6:,.1f} MB)", flush=True
    )


def _report(written: Written) -> None:
    print(f"rows           {written.path} ({written.rows})")
    for reason, count in written.left_out.most_common(_SHOWN):
        print(f"  left out: {count} x {reason}", file=sys.stderr)
    if (more := len(written.left_out) - _SHOWN) > 0:
        print(f"  and {more} other reasons", file=sys.stderr)
    if written.without_media:
        print(
            f"  {written.without_media} rows name media that are not here ({written.example}): "
            "bring them there before training",
            file=sys.stderr,
        )


def _record(
    chosen: PublicDataset,
    snapshot: Snapshot,
    files: Sequence[HubFile],
    written: Sequence[Written],
    root: Path,
) -> None:
    """fetched.json: what this folder was made from."""
    found = {
        "dataset": chosen.name,
        "repo": snapshot.repo,
        "revision": snapshot.revision,
        "commit": snapshot.commit,
        "files": {file.path: file.checksum for file in files},
        "rows": {one.path.name: one.rows for one in written},
        "left_out": {one.path.name: sum(one.left_out.values()) for one in written},
    }
    replace_text(root / MANIFEST, json.dumps(found, indent=1) + "\n")
