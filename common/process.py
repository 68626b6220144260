"""The process we are in: its GPU, its garbage, and memory back to the system.

Memory freed in the middle of glibc's heap stays with the process until the heap is trimmed;
jemalloc gives it back by itself.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from avatar_rl.common.errors import ResourceError

EVERY_S = 30.0
#: Begins the line by which a worker's log says whose it is.
ROLE_MARK = ":avatar_role:"
#: mallopt(3): option and value. One arena, not one per thread. Blocks from 64 KiB on are pages of
#: their own (by itself glibc raises that bound as large blocks are freed). Memory that is free at
#: the heap's end goes back at once.
_COMPACT = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_THRESHOLD": (-3, 64 << 10),
    "M_TRIM_THRESHOLD": (-1, 64 << 10),
}


def sees_gpu() -> bool:
    """Whether this process has a GPU to work on.

    Raises ResourceError where Ray has given this worker a GPU that torch does not see: it would
    continue on the CPU.
    """
    import torch

    if torch.cuda.is_available():
        return True
    ray = sys.modules.get("ray")
    if (
        ray is not None
        and ray.is_initialized()
        and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    ):
        raise ResourceError(
            "Ray has given this process a GPU, but torch sees none: its environment has the CPU "
            "stack (`make setup EXTRA=gpu` installs the other), or the driver is missing; for the "
            "CPU start it with CUDA_VISIBLE_DEVICES="
        )
    return False


def name_log(role: str) -> None:
    """Say in this worker's two log files whose they are: `rollout-0`, `learner-1`."""
    for stream in (sys.stdout, sys.stderr):
        print(f"{ROLE_MARK}{role}", file=stream, flush=True)


def memory_metrics() -> dict[str, float]:
    """Memory of this process, and the most that its GPU has held, in GiB."""
    import psutil

    found = {"memory/learner": psutil.Process().memory_info().rss / (1 << 30)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["memory/learner_gpu"] = torch.cuda.max_memory_allocated() / (1 << 30)
    return found


def device_name() -> str:
    """What the driver calls this process' GPU; "" without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_name())


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's own, where the C library has it."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
        return function
    except (AttributeError, OSError, TypeError):  # musl, macOS
        return None


def compact_heap() -> bool:
    """Keep glibc's heap as large as what is in use, in a process that lives long.

    Without it the driver's heap grew for as long as it ran, from holes between what several threads
    keep. Call it early. False where the C library has no such settings.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(
        mallopt(option, value) == 1 for option, value in _COMPACT.values()
    )


def trim_heap() -> None:
    """Give what was freed back to the system at once, where the C library can."""
    gc.collect()
    release = _glibc("malloc_trim")
    if release is not None:
        release(0)


@contextmanager
def no_collections() -> Iterator[None]:
    """No garbage collections in this block, which is for imports and set-up. Do not nest it.

    They make a million objects that stay, and Python would look through them again and again: a
    fifth of the time that a worker takes to start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def set_aside_imports() -> None:
    """Leave all objects of now out of the full collections.

    vLLM and DeepSpeed ask for several as they start, 0.4 s each.
    """
    gc.freeze()


class HeapTrimmer:
    """Gives memory back every ``every_s`` seconds. Call ``trim`` often, between pieces of work.

    glibc's heap grows for hours while no more of it is in use
    (``avatar_rl.cluster.services.allocator``). Tensors in dead reference cycles wait for a full
    collection. Python puts that off until a quarter of all objects is new: with half a million of
    them from imports, hundreds of MiB later. Make one at the end of a worker's set-up: objects of
    then are left out of all collections, so that a full one is cheap, too.
    """

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
