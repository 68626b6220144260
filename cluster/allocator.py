"""The memory allocator of worker processes on a CPU: jemalloc, which Ray brings along.

Tensors of ever new shapes leave holes of all sizes in glibc's heap, which therefore grows for an hour while no more of
it is in use. jemalloc serves them from runs of like size and gives back what lay idle for some seconds.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

#: One arena, for threads of an actor take turns. What was not used for 10 s goes back to the system, blocks above 8 MiB
#: too: every step needs such again, and new pages cost it 4 %.
SETTINGS = "narenas:1,dirty_decay_ms:10000,muzzy_decay_ms:0,oversize_threshold:0"


def jemalloc() -> dict[str, str]:
    """Environment of a process that is to use it; empty where there is none, or the user preloads something himself."""
    ray = importlib.util.find_spec("ray")
    if ray is None or ray.origin is None or sys.platform != "linux" or "LD_PRELOAD" in os.environ:
        return {}
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": SETTINGS} if library.is_file() else {}
