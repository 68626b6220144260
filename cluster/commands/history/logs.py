"""`avatar logs RUN [ROLE]`: what the run's processes have printed, and what happened, also while it
goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from avatar_rl.cluster.telemetry.run_files import ENDED, read_status
from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.common.text import printable

EVENTS = "events"
#: Roles whose logs lie elsewhere in the run folder.
ELSEWHERE = {"redis": Path("redis") / "redis.log", "judge": Path("judge.log")}
LOOK_S = 0.5


@dataclass
class _Tail:
    """A file that may grow: ``read`` gives its new whole lines."""

    path: Path
    offset: int = 0
    torn: str = field(default="")

    def read(self) -> list[str]:
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self.torn = (self.torn + new.decode(errors="replace")).split("\n")
        return lines


def roles_of(run: Path) -> dict[str, Path]:
    """The run's logs by role, events first; those that are empty are left out."""
    found = {EVENTS: run / "events.jsonl"}
    found |= {file.stem: file for file in sorted((run / "logs").glob("*.log"))}
    found |= {role: run / path for role, path in ELSEWHERE.items()}
    return {role: path for role, path in found.items() if path.is_file() and path.stat().st_size}


def logs(run: Path, role: str | None, *, lines: int, follow: bool) -> int:
    """Print the last ``lines`` of a role's log, or of every one; with ``follow`` also what comes,
    until the run is over.

    ``rollout`` means rollout-0 and all others of the kind. Raises ConfigError for a role without a
    log, naming those with one."""
    read_status(run)
    chosen = _chosen(run, role)
    if not chosen and not (follow and _is_going(run)):
        raise ConfigError(_no_log(run, role))
    tails: dict[str, _Tail] = {}
    for name, path in chosen.items():
        tails[name] = _Tail(path)
        new = tails[name].read()
        if len(chosen) > 1:
            print(f"==> {name} <==")
        for line in new[-lines:] if lines else new:
            print(_line(name, line))
    while follow:
        going = _is_going(run)
        for name, path in _chosen(run, role).items():
            tail = tails.setdefault(name, _Tail(path))
            for line in tail.read():
                print(f"{name}  {_line(name, line)}", flush=True)
        if not going:
            return 0
        time.sleep(LOOK_S)
    return 0


def last_lines(run: Path, count: int, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(role, line) of the end of each worker's log whose role is ``wanted``."""
    for role, path in roles_of(run).items():
        if role != EVENTS and wanted(role):
            for line in _Tail(path).read()[-count:]:
                yield role, line


def _chosen(run: Path, role: str | None) -> dict[str, Path]:
    there = roles_of(run)
    if role is None:
        return there
    return {
        name: path for name, path in there.items() if name == role or name.startswith(f"{role}-")
    }


def _no_log(run: Path, role: str | None) -> str:
    there = ", ".join(roles_of(run)) or "none yet (workers write when they have something to say)"
    wanted = f"role {role!r}" if role is not None else "no role"
    return f"run {run.name} has no log of {wanted}: there are {there}"


def _is_going(run: Path) -> bool:
    try:
        status = read_status(run)
    except DataError:  # replaced at this moment on a file system without atomic renames
        return True
    return status.state not in ENDED and not status.lost


def _line(role: str, line: str) -> str:
    if role != EVENTS:
        return printable(line)
    try:
        row = json.loads(line)
    except ValueError:
        return printable(line)
    if not isinstance(row, dict):
        return printable(line)
    at = time.strftime("%H:%M:%S", time.localtime(float(row.get("timestamp") or 0)))
    return printable(f"{at} step {row.get('step')}  {row.get('kind')}: {row.get('message')}")
