"""A small process that outlives a killed driver just long enough to end what the driver left
behind.

Most of what a run starts asks the kernel to end it with its parent. Ray's agents do not; so the
driver names its processes to this one over a pipe, and the end of the pipe without a farewell means
that the driver is dead."""

from __future__ import annotations

import subprocess
import sys

import psutil

#: Reads "pid start" lines (start: ticks since boot, field 22 of /proc/PID/stat); needs the standard
#: library alone.
_CODE = """
import os, signal, sys, time
def start(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None
words = [line.split() for line in sys.stdin]
if not words or words[-1] != ["done"]:
    time.sleep(2.0)
    for pid, began in words:
        if start(int(pid)) == began:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
"""


class OrphanReaper:
    """Knows the processes that this one has started so far."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._say("".join(f"{pid} {began}\n" for pid, began in _started(self._process.pid)))

    def close(self) -> None:
        """The driver ends in order and has stopped its processes itself."""
        self._say("done\n")
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
        except BrokenPipeError:  # somebody ended it; then the kernel's help must do
            return


def _started(own: int) -> list[tuple[int, str]]:
    """(pid, start) of every descendant but the orphan reaper's own process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            with open(f"/proc/{child.pid}/stat") as file:
                began = file.read().rpartition(")")[2].split()[19]
        except OSError:  # it ended meanwhile, or there is no /proc: nothing to be named
            continue
        if child.pid != own:
            found.append((child.pid, began))
    return found
