"""Saved completions of a run: a compact table of all, and groups one by one with everything."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import msgspec

from avatar_rl.cluster.telemetry.run_files import Sample
from avatar_rl.cluster.view.clean import clean
from avatar_rl.cluster.view.reading import Faults, lines_of
from avatar_rl.common.types import Json, JsonObject

#: Characters of a completion in the table; all of them are in the texts, which are fetched when
#: somebody searches.
SNIPPET = 120
#: Bits of a row's flags; static/rollouts.js has them too.
HINTED, REPLAYED, MASKED, QUARANTINED, DEAD, IMPUTED, TRUNCATED, HELD_OUT = (
    1 << bit for bit in range(8)
)
COLUMNS = (
    "file",  # number in files
    "group",  # number in its file
    "row",  # number in its group
    "prompt",  # number in prompts
    "reward",
    "accuracy",
    "tier",  # "", hard, medium, easy
    "flags",
    "advantage",
    "tokens",
    "version",
    "age",
    "snippet",
)


class _Brief(msgspec.Struct):
    """What the table needs of a row; the lists per token are passed over."""

    text: str = ""
    prompt_id: str = ""
    question: str = ""
    type: str = ""
    category: str = ""
    group: str | None = None
    replayed: bool = False
    hinted: bool = False
    imputed: bool = False
    dead_before: bool | None = None
    reward: float | None = None
    accuracy: float | None = None
    tier: str | None = None
    advantage: float | None = None
    tokens: int | None = None
    version: int | None = None
    age: int | None = None
    finish_reason: str = ""
    components: dict[str, float | None] = {}


@dataclass(frozen=True)
class SampleFile:
    """A file of samples/, read once for each of its states."""

    name: str  # its stem
    stamp: tuple[int, int]  # modification time, bytes
    rows: tuple[_Brief, ...]
    groups: tuple[int, ...]  # rows in each group
    faults: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        return self.name.startswith("eval_")

    @property
    def step(self) -> int:
        last = self.name.rpartition("_")[2]
        return int(last) if last.isdecimal() else 0


class Rollouts:
    """The samples of one run. Thread-safe; a file is read again when it has changed."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "samples"
        self._known: dict[str, SampleFile] = {}
        self._lock = threading.Lock()

    def files(self) -> list[SampleFile]:
        """By step, training groups before the answers of the evaluation after them."""
        with self._lock:
            found = {}
            for path in self.folder.glob("*_*.jsonl"):
                try:
                    stat = path.stat()
                except OSError:  # it has just made room
                    continue
                stamp = (stat.st_mtime_ns, stat.st_size)
                known = self._known.get(path.stem)
                fresh = known is None or known.stamp != stamp
                found[path.stem] = _read(path, stamp) if fresh or known is None else known
            self._known = found
            return sorted(found.values(), key=lambda file: (file.step, file.held_out, file.name))

    def stamp(self) -> list[Json]:
        """Changes when a file does."""
        found: list[Json] = []
        for path in sorted(self.folder.glob("*_*.jsonl")):
            try:
                stat = path.stat()
            except OSError:
                continue
            found.append([path.name, stat.st_mtime_ns, stat.st_size])
        return found

    def table(self, quarantined: set[str]) -> JsonObject:
        """Every saved completion in a row of ``COLUMNS``; prompts and files apart."""
        prompts: dict[tuple[str, str], int] = {}
        shown: list[Json] = []
        rows: list[Json] = []
        files = self.files()
        for number, file in enumerate(files):
            at = 0
            for group, count in enumerate(file.groups):
                members = file.rows[at : at + count]
                dead = _is_dead(members, file.held_out)
                for index, row in enumerate(members):
                    prompt = prompts.setdefault((row.prompt_id, row.question), len(prompts))
                    if prompt == len(shown):
                        shown.append([row.prompt_id, row.question, row.category or row.type])
                    flags = _flags(row, file, dead, row.prompt_id in quarantined)
                    rows.append([number, group, index, prompt, *_values(row, flags)])
                at += count
        return {
            "columns": list(COLUMNS),
            "rows": rows,
            "prompts": shown,
            "files": [[file.name, file.step, file.held_out] for file in files],
            "faults": [fault for file in files for fault in file.faults],
        }

    def texts(self) -> list[str]:
        """Whole completions, in the order of the table's rows."""
        return [row.text for file in self.files() for row in file.rows]

    def group(self, name: str, number: int) -> list[Sample] | None:
        """All that is saved of one group; None where there is no such group."""
        file = next((file for file in self.files() if file.name == name), None)
        if file is None or not 0 <= number < len(file.groups):
            return None
        start = sum(file.groups[:number])
        wanted = range(start, start + file.groups[number])
        rows = _readable(self.folder / f"{name}.jsonl", Faults())
        if wanted.stop > len(rows):  # it has changed since
            return None
        return [clean(json.loads(rows[i][0])) for i in wanted]

    def samples(self, name: str) -> list[Sample]:
        """All rows of one file."""
        rows = _readable(self.folder / f"{name}.jsonl", Faults())
        return [clean(json.loads(line)) for line, _ in rows]

    def summaries(self) -> list[JsonObject]:
        """Step by step: the groups of each file, with the rewards of their halves."""
        found: list[JsonObject] = []
        for file in self.files():
            groups: list[Json] = []
            at = 0
            for count in file.groups:
                members = file.rows[at : at + count]
                at += count
                first = members[0]
                groups.append(
                    {
                        "prompt": first.prompt_id,
                        "question": first.question,
                        "type": first.category or first.type,
                        "tier": first.tier or "",
                        "hinted": first.hinted,
                        "dead": _is_dead(members, file.held_out),
                        "rows": [[_paid(row), row.replayed] for row in members],
                    }
                )
            found.append(
                {
                    "file": file.name,
                    "step": file.step,
                    "held_out": file.held_out,
                    "groups": groups,
                }
            )
        return found


def _read(path: Path, stamp: tuple[int, int]) -> SampleFile:
    faults = Faults()
    rows = [row for _, row in _readable(path, faults)]
    return SampleFile(path.stem, stamp, tuple(rows), tuple(_groups(rows, path)), tuple(faults.said))


def _readable(path: Path, faults: Faults) -> list[tuple[bytes, _Brief]]:
    """The lines that are samples, with what the table needs of them."""
    decode = msgspec.json.Decoder(_Brief, strict=False).decode
    found = []
    for number, line in lines_of(path, faults):
        try:
            found.append((line, decode(line)))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            faults.add(path, f"line {number} is no sample and left out ({error})")
    return found


def _groups(rows: Sequence[_Brief], path: Path) -> list[int]:
    """How many rows each group has: by the group's id or, in older files, by the prompt's. A
    held-out answer is a group."""
    if path.name.startswith("eval_"):
        return [1] * len(rows)
    return [len(list(run)) for _, run in groupby(rows, key=lambda row: row.group or row.prompt_id)]


def _is_dead(members: Sequence[_Brief], held_out: bool) -> bool:
    """Whether the fresh half teaches nothing of its own: its rewards are all alike."""
    if held_out:
        return False
    if members[0].dead_before is not None:
        return members[0].dead_before
    return len({row.reward for row in members if not row.replayed}) < 2


def _paid(row: _Brief) -> float | None:
    return row.accuracy if row.reward is None else round(row.reward, 4)


def _flags(row: _Brief, file: SampleFile, dead: bool, quarantined: bool) -> int:
    bits = (
        (HINTED, row.hinted),
        (REPLAYED, row.replayed),
        (MASKED, any(value is None for value in row.components.values())),
        (QUARANTINED, quarantined),
        (DEAD, dead),
        (IMPUTED, row.imputed),
        (TRUNCATED, row.finish_reason == "length"),
        (HELD_OUT, file.held_out),
    )
    return sum(bit for bit, is_set in bits if is_set)


def _values(row: _Brief, flags: int) -> list[Json]:
    return [
        None if row.reward is None else round(row.reward, 4),
        None if row.accuracy is None else round(row.accuracy, 4),
        row.tier or "",
        flags,
        row.advantage,
        row.tokens,
        row.version,
        row.age,
        row.text[:SNIPPET],
    ]
