"""What runs share on disk is made once: who wants it while another run makes it, waits and finds
it."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def made_once(folder: Path, on_wait: Callable[[str], None]) -> Iterator[bool]:
    """Whether the caller has to make ``folder``; nobody else does within this block.

    ``on_wait`` is told when another run is at it. Should that one die, its lock dies with it and
    the caller takes over."""
    if folder.is_dir():
        yield False
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait(f"another run makes {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield not folder.is_dir()
