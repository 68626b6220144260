"""What workers print, in the run folder by role while they run.

Ray keeps a pair of files for each worker process, named by its id, below its own session. Here they
are followed and written on as ``logs/<role>.log``: learner-0, rollout-1, reward ...
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from avatar_rl.common.process import ROLE_MARK

log = logging.getLogger(__name__)

#: Roles of the classes that do not say theirs; several processes are numbered as they come.
CLASSES = {"RewardActor": "reward", "WeightStore": "weights", "StateReplica": "replica"}
_ACTOR_MARK = ":actor_name:"
_MARKS = (":job_id:", ":task_name:", _ACTOR_MARK, ROLE_MARK)


@dataclass
class _Source:
    """One of Ray's files, and how far it is read."""

    path: Path
    offset: int = 0
    torn: bytes = b""  # after the last newline
    held: list[bytes] = field(default_factory=list)  # lines of before its role is known


class LogMirror:
    """Follows the workers' files in a thread until the block ends, then reads the rest.

    Args:
        source: Ray's folder of logs.
        pattern: Names of this run's worker processes between ``worker-`` and the suffix.
        out: Folder of the role's files; it is made when there is something to write.
    """

    EVERY_S = 1.0
    #: Read at once per file and look, so that a worker that prints without end stalls nobody.
    MOST = 4 << 20

    def __init__(self, source: Path, pattern: str, out: Path) -> None:
        self.source, self.pattern, self.out = source, pattern, out
        self._sources: dict[Path, _Source] = {}
        self._roles: dict[str, str] = {}  # process -> role
        self._named: Counter[str] = Counter()
        self._last: dict[str, str] = {}  # role -> the process that wrote last
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="log-mirror", daemon=True)
        self._warned = False

    def __enter__(self) -> LogMirror:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Read what is left; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self.look(last=True)

    def _follow(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            self.look()

    def look(self, *, last: bool = False) -> None:
        """Write on what is new. What cannot be is told once: a run must not end for its logs."""
        try:
            files = sorted(self.source.glob(f"worker-{self.pattern}.out"))
            for file in [*files, *(file.with_suffix(".err") for file in files)]:
                self._read(self._sources.setdefault(file, _Source(file)), last=last)
        except OSError as error:
            if not self._warned:
                log.warning("logs of workers are not written to %s: %s", self.out, error)
            self._warned = True

    def _read(self, source: _Source, *, last: bool) -> None:
        if not source.path.is_file() or source.path.stat().st_size <= source.offset:
            return
        with source.path.open("rb") as file:
            file.seek(source.offset)
            new = file.read() if last else file.read(self.MOST)
        source.offset += len(new)
        *lines, source.torn = (source.torn + new).split(b"\n")
        if last and source.torn:
            lines.append(source.torn)
        self._write(source, lines, last=last)

    def _write(self, source: _Source, lines: list[bytes], *, last: bool) -> None:
        process = source.path.stem.rpartition("-")[2]
        for line in lines:
            self._take_mark(process, line.decode(errors="replace"))
        source.held += [line for line in lines if not line.startswith(_ENCODED)]
        role = self._roles.get(process)
        if role is None:
            if not last:
                return
            role = "workers"  # one that never became an actor
        if not source.held:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / f"{role}.log").open("ab") as file:
            if self._last.get(role) != process:
                file.write(f"--- process {process}\n".encode())
            file.write(b"".join(line + b"\n" for line in source.held))
        self._last[role] = process
        source.held.clear()

    def _take_mark(self, process: str, line: str) -> None:
        """Learn the role of a process from the first lines it prints."""
        if line.startswith(ROLE_MARK):
            self._roles[process] = line.removeprefix(ROLE_MARK)
        elif line.startswith(_ACTOR_MARK) and process not in self._roles:
            role = CLASSES.get(line.removeprefix(_ACTOR_MARK))
            if role is not None:
                number = self._named[role]
                self._named[role] += 1
                self._roles[process] = role if number == 0 else f"{role}-{number}"


_ENCODED = tuple(mark.encode() for mark in _MARKS)
