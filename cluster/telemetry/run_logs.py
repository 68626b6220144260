"""The logs of a run by role, and what a failed run says at its end."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from avatar_rl.common.errors import ConfigError, InputError, ModelError

EVENTS = "events"
#: Roles whose logs lie elsewhere in the run folder.
ELSEWHERE = {"redis": Path("redis") / "redis.log", "judge": Path("judge.log")}
#: Lines of a log's end that are looked at for the fault.
LOOKED_AT = 200
_FAULT = re.compile(
    r"^(?:\(\w+ pid=\d+\) )?[\w.]*(?:Error|Exception|Killed|Segmentation fault)\b.*"
)


@dataclass
class Tail:
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


def farewell(run: Path, error: BaseException | str) -> str:
    """Where to look after a run has failed, and what to do next; the cause itself is ``error``."""
    lines = [f"run folder   {run}"]
    found = _log_of(run, str(error))
    if found is not None:
        role, fault = found
        lines.append(f"log          avatar logs {run} {role}")
        if fault and fault not in str(error):
            lines.append(f"             {fault[:300]}")
    lines.append(f"next         {_next(run, error)}")
    return "\n".join(lines)


def _log_of(run: Path, said: str) -> tuple[str, str] | None:
    """The role whose log tells of the failure, and its last line about a fault: one that the error
    names, else the one written last that has such a line."""
    logs = {role: path for role, path in roles_of(run).items() if role != EVENTS}
    faults = {role: _fault_in(path) for role, path in logs.items()}
    named = [role for role in logs if re.search(rf"\b{re.escape(_kind(role))}\b", said)]
    candidates = [role for role in named if faults[role]] or named
    candidates = candidates or [role for role in logs if faults[role]]
    if not candidates:
        return None
    role = max(candidates, key=lambda role: logs[role].stat().st_mtime)
    return role, faults[role]


def _kind(role: str) -> str:
    """A learner rank is spoken of as the learner; a rollout actor by its own name."""
    return "learner" if role.startswith("learner") else role


def _fault_in(path: Path) -> str:
    lines = Tail(path).read()[-LOOKED_AT:]
    return next((line.strip() for line in reversed(lines) if _FAULT.match(line.strip())), "")


def _next(run: Path, error: BaseException | str) -> str:
    again = command_of(run)
    if isinstance(error, ConfigError | InputError | ModelError) and again:
        return f"correct that, then {again}"
    if any((run / "checkpoints").glob("*/")):
        return f"avatar runs resume {run}"
    return again or f"avatar runs show {run}"


def command_of(run: Path) -> str:
    """The command that began the run, secrets masked; empty where it is not known."""
    try:
        words = json.loads((run / "environment.json").read_bytes()).get("command")
    except (OSError, ValueError, AttributeError):
        return ""
    if not isinstance(words, list) or not words:
        return ""
    return " ".join(["avatar", *map(str, words[1:])])
