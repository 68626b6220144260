"""Freed memory goes back to the system, and only when it is due."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from prompts.heap import HeapTrimmer

HOLES = """
import psutil
from prompts.heap import HeapTrimmer
kept = [bytearray(100_000) for _ in range(4000)]
del kept[::2]  # holes everywhere, none at the top
def held(): return psutil.Process().memory_full_info().uss / 2**20
heap = HeapTrimmer(active=True, every_s=0.0)
before = held()
heap.trim()
print(before - held(), heap.count)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_holes_in_the_heap_go_back_to_the_system() -> None:
    said = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout
    freed, count = said.split()
    assert float(freed) > 150 and int(count) == 1  # of 190 MiB


def test_it_is_not_done_before_it_is_due_nor_where_it_is_not_wanted() -> None:
    early, never = HeapTrimmer(active=True, every_s=1000.0), HeapTrimmer(active=False, every_s=0.0)
    for heap in (early, never):
        heap.trim()
        assert heap.count == 0 and heap.seconds == 0
