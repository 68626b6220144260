"""The memory allocator of worker processes on a CPU: jemalloc, which Ray brings along.

Tensors of ever new shapes leave holes of all sizes in glibc's heap, which therefore grows for an
hour while no more of it is in use. jemalloc serves them from runs of like size and gives back what
lay idle for some seconds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

#: One arena, for threads of an actor take turns. What was not used for 10 s goes back to the
#: system, blocks above 8 MiB too: every step needs such again, and new pages cost it 4 %.
SETTINGS = "narenas:1,dirty_decay_ms:10000,muzzy_decay_ms:0,oversize_threshold:0"


def jemalloc() -> dict[str, str]:
    """Environment of a process that is to use it; empty where there is none that works, or the user
    preloads one."""
    ray = importlib.util.find_spec("ray")
    if ray is None or ray.origin is None or sys.platform != "linux" or "LD_PRELOAD" in os.environ:
        return {}
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return _environment(library) if library.is_file() and _works(library) else {}


def _environment(library: Path) -> dict[str, str]:
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": SETTINGS}


@cache
def _works(library: Path) -> bool:
    """A process starts with it: one for other pages than this kernel's would end every worker."""
    probe = [sys.executable, "-S", "-c", ""]
    done = subprocess.run(probe, env=os.environ | _environment(library), stderr=subprocess.PIPE)
    return done.returncode == 0 and not done.stderr
