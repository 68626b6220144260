"""Whose turn it is on a device that rollout engines and the learner share: a lock of the operating
system, which a process that dies gives back at once."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

from avatar_rl.common.errors import ResourceError

#: A process that was killed keeps its lock until the system has taken its memory back.
PATIENCE_S = 60.0
POLL_S = 0.005


class TurnLock:
    """Rollout engines hold it together, or learner ranks do, and never both.

    Locks of byte ranges of one file (fcntl): an engine takes all bytes, shared with other engines;
    rank r takes byte r for itself. The system keeps them, so they hold against any mistake of ours,
    end with their process, and are not inherited by its children. A process has one of these at
    most: closing the file a second time would drop the lock of the first.

    The file lists who took it and gave it back, a JSON object a line: ``at`` (seconds of the
    machine's monotonic clock), ``who``, ``pid``, ``holds``.
    """

    def __init__(self, path: Path, who: str, *, rank: int | None = None) -> None:
        """``rank``: of a learner rank; None: an engine's."""
        self.path, self.who, self.rank = path, who, rank
        self.held = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def take(self, patience_s: float = PATIENCE_S) -> None:
        """Returns once this process may work on the device. Raises ResourceError where the other
        side still does after ``patience_s``."""
        if self.held:
            return
        how = fcntl.LOCK_SH if self.rank is None else fcntl.LOCK_EX
        where = (0, 0) if self.rank is None else (1, self.rank)  # (length, start); 0: to the end
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.lockf(self._file, how | fcntl.LOCK_NB, *where)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    other = "a learner rank" if self.rank is None else "a rollout engine"
                    raise ResourceError(
                        f"{self.who} waited {patience_s:g} s for its turn on the shared device: "
                        f"{other} of this run still works ({self.path} says since when); end that "
                        "process, or resume the run"
                    ) from error
                time.sleep(POLL_S)
        self.held = True
        self._note()

    def give_back(self) -> None:
        """The other side may work now."""
        if not self.held:
            return
        self.held = False
        self._note()
        fcntl.lockf(self._file, fcntl.LOCK_UN)

    def check(self) -> None:
        """Raises ResourceError outside this process's turn."""
        if not self.held:
            raise ResourceError(
                f"{self.who} was asked to work on the shared device outside its turn: this is a "
                "fault of the run's own order, please report it"
            )

    def _note(self) -> None:
        """Written while the lock is held, so that the lines are in the order of the turns."""
        told = {"at": time.monotonic(), "who": self.who, "pid": os.getpid(), "holds": self.held}
        os.write(self._file, json.dumps(told).encode() + b"\n")
