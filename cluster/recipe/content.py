"""Short keys and digests by which what was made once is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from avatar_rl.common.types import ReadOnlyJson

#: Raise when the synthetic world, the tiny model or the cold start gives other bytes for an equal
#: config.
REVISION = 1


def model_digest(path: Path) -> str:
    """sha256 over the names and sizes of a model folder's files and the content of the small
    ones."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file():
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            if file.stat().st_size < 64 << 20:
                digest.update(file.read_bytes())
    return digest.hexdigest()


def key(settings: ReadOnlyJson) -> str:
    """Short content key of JSON-ready settings."""
    text = json.dumps([REVISION, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
