"""Freed memory goes back to the system, dead cycles are found, only when it is due, and not during
set-up."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from avatar_rl.common.process import HeapTrimmer, no_collections

HOLES = """
import gc, psutil, weakref
from avatar_rl.common.process import HeapTrimmer

class Node: pass

early = HeapTrimmer(active=True, every_s=1000.0)
heap = HeapTrimmer(active=True, every_s=0.0)
kept = [bytearray(100_000) for _ in range(4000)]
del kept[::2]  # holes everywhere, none at the top
gc.disable()
node = Node()
node.itself, gone = node, weakref.ref(node)
del node
def held(): return psutil.Process().memory_full_info().uss / 2**20
before = held()
early.trim()
assert early.count == 0 and early.seconds == 0 and gone() is not None
heap.trim()
print(before - held(), heap.count, gone() is None, gc.get_freeze_count() > 1000)
"""

COMPACT = """
import sys, psutil
from avatar_rl.common.process import compact_heap
if sys.argv[1] == "compact":
    assert compact_heap()
def held(): return psutil.Process().memory_full_info().uss / 2**20
kept = [bytearray(100_000) for _ in range(1000)]
before = held()
del kept[::2]
print(before - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_holes_in_the_heap_go_back_to_the_system_and_dead_cycles_with_them() -> None:
    said = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=True
    ).stdout
    freed, *rest = said.split()
    assert float(freed) > 150 and rest == ["1", "True", "True"]  # of 190 MiB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_in_a_compact_heap_holes_go_back_by_themselves() -> None:
    freed = {
        how: float(subprocess.check_output([sys.executable, "-c", COMPACT, how], text=True))
        for how in ("compact", "not")
    }
    assert freed["compact"] > 40 and freed["not"] < 5  # of 48 MiB


def test_nothing_is_done_where_it_is_not_wanted() -> None:
    never = HeapTrimmer(active=False, every_s=0.0)
    never.trim()
    assert never.count == 0 and never.seconds == 0


def test_python_does_not_collect_during_set_up_and_does_afterwards() -> None:
    with pytest.raises(RuntimeError), no_collections():
        assert not gc.isenabled()
        raise RuntimeError("no such model")
    assert gc.isenabled()
