"""A process's garbage: when Python looks for it, and memory back to the system.

What is freed in the middle of glibc's heap stays with the process, unless it is asked (jemalloc
gives it by itself)."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 30.0
#: mallopt(3): what, and how much. One arena, not one per thread; blocks from 64 KiB on are pages of
#: their own (by itself glibc raises that bound as large blocks are freed); and what is free at the
#: heap's end goes back at once.
_COMPACT = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_THRESHOLD": (-3, 64 << 10),
    "M_TRIM_THRESHOLD": (-1, 64 << 10),
}


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's own, where the C library has it."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
        return function
    except (AttributeError, OSError, TypeError):  # musl, macOS
        return None


def compact_heap() -> bool:
    """For a process that lives long and computes little: glibc's heap stays as large as what is in
    use.

    A driver's grew for as long as it ran with no more in use: holes between what several threads
    keep. Call it early; False where the C library has no such settings."""
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(
        mallopt(option, value) == 1 for option, value in _COMPACT.values()
    )


@contextmanager
def no_collections() -> Iterator[None]:
    """Around imports and set-up: they make a million objects that stay, and Python looks through
    them again and again.

    A fifth of the time that a worker takes to start. Not for nesting.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def set_aside_imports() -> None:
    """What lives now is left out of the full collections that vLLM and DeepSpeed ask for as they
    start, 0.4 s each."""
    gc.freeze()


class HeapTrimmer:
    """``trim`` is called often, between two pieces of work, and does something every ``every_s``
    seconds.

    glibc's heap grows for hours while no more of it is in use
    (``avatar_rl.cluster.services.allocator``). Tensors in dead reference cycles wait for a full
    collection, which Python puts off until a quarter of all objects is new: with half a million of
    them from imports, hundreds of MiB later. Make one at the end of the worker's setup: what lives
    then is left out of all collections, so that a full one is cheap, too."""

    def __init__(self, *, active: bool, every_s: float = EVERY_S) -> None:
        self._active, self._release = active, _glibc("malloc_trim")
        self._every_s, self._last = every_s, time.monotonic()
        self.seconds = 0.0  # spent in all trims
        self.count = 0
        if active:
            gc.collect()
            gc.freeze()

    def trim(self) -> None:
        now = time.monotonic()
        if not self._active or now - self._last < self._every_s:
            return
        gc.collect()
        if self._release is not None:
            self._release(0)
        self._last = time.monotonic()
        self.seconds += self._last - now
        self.count += 1
