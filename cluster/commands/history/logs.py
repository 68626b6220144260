"""`avatar logs RUN [ROLE]`: what the run's processes have printed, and what happened, also while it
goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

from avatar_rl.cluster.telemetry.run_files import ENDED, read_status
from avatar_rl.cluster.telemetry.run_logs import EVENTS, Tail, roles_of
from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.common.text import printable

LOOK_S = 0.5


def logs(run: Path, role: str | None, *, lines: int, follow: bool) -> int:
    """Print the last ``lines`` of a role's log, or of every one; with ``follow`` also what comes,
    until the run is over.

    ``rollout`` means rollout-0 and all others of the kind. Raises ConfigError for a role without a
    log, naming those with one."""
    read_status(run)
    chosen = _chosen(run, role)
    if not chosen and not (follow and _is_going(run)):
        raise ConfigError(_no_log(run, role))
    tails: dict[str, Tail] = {}
    for name, path in chosen.items():
        tails[name] = Tail(path)
        new = tails[name].read()
        if len(chosen) > 1:
            print(f"==> {name} <==")
        for line in new[-lines:] if lines else new:
            print(_line(name, line))
    while follow:
        going = _is_going(run)
        for name, path in _chosen(run, role).items():
            tail = tails.setdefault(name, Tail(path))
            for line in tail.read():
                print(f"{name}  {_line(name, line)}", flush=True)
        if not going:
            return 0
        time.sleep(LOOK_S)
    return 0


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
