"""Rows a second and peak memory of `avatar data validate` -> build/bench/validate.json; run with
``make bench NAME=validate``, about a minute.

10,000 rows of several layouts, some of them wrong, are checked by the command itself. So the time
holds its start, and the memory the whole process. Media are checked to be there, not decoded."""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from avatar_rl.common.types import JsonObject
from benchmarks.harness import Figures, parser

ROWS, SMOKE_ROWS = 10_000, 300
WRONG_EVERY = 100
CLIPS = 50
MIB = 1024.0


def a_row(number: int) -> JsonObject:
    """Question ``number`` in one of four layouts."""
    clip = f"clips/{number % CLIPS}.mp4"
    question, answer = f"How many dogs bark in scene {number}?", str(number % 7)
    rows: tuple[JsonObject, ...] = (
        {"problem": question, "solution": f"<answer>{answer}</answer>", "video": clip},
        {"question": question, "answer": answer, "path": clip, "data_type": "video"},
        {"messages": [{"role": "user", "content": f"<video>{question}"}], "videos": [clip]},
        {"query": question, "response": answer, "video": {"video": clip, "fps": 2}},
    )
    row = rows[number % len(rows)]
    if "messages" in row:
        row["solution"] = answer
    return row | {"problem_type": "numerical", "id": f"q{number}", "tests": [number, {"a": 1}]}


def spoilt(row: JsonObject, number: int) -> JsonObject:
    """One of the faults whose message could be as long as the row's content."""
    content = base64.b64encode(os.urandom(30_000)).decode()
    faults: tuple[JsonObject, ...] = (
        {"video": f"data:video/mp4;base64,{content}"},
        {"solution": "<think>" + "so " * 20_000, "answer": None, "response": None},
        {"problem_type": "essay " * 5_000},
        {"video": "x" * 50_000},
    )
    return row | faults[number // WRONG_EVERY % len(faults)]


def write(folder: Path, rows: int) -> Path:
    """The dataset and its (empty but for a byte) clips."""
    (folder / "clips").mkdir()
    for number in range(CLIPS):
        (folder / f"clips/{number}.mp4").write_bytes(b"x")
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            row = a_row(number)
            wrong = number % WRONG_EVERY == WRONG_EVERY - 1
            file.write(json.dumps(spoilt(row, number) if wrong else row) + "\n")
    return path


def main() -> None:
    options = parser(__doc__).parse_args()
    rows = SMOKE_ROWS if options.smoke else ROWS
    figures = Figures("validate", options.out)
    with tempfile.TemporaryDirectory(prefix="validate_") as name:
        path = write(Path(name), rows)
        command = [sys.executable, "-m", "avatar_rl.cluster.cli", "data", "validate"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        found = subprocess.run(
            [*command, "--no-decode", str(path)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        )
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = path.stat().st_size
    lines = (found.stdout + found.stderr).splitlines()
    expected = rows // WRONG_EVERY
    if found.returncode != 1 or f"{expected} problems" not in found.stdout:
        raise RuntimeError(f"exit code {found.returncode}: {found.stdout[-2000:]}{found.stderr}")
    figures.add({"rows": rows, "mb": size / 1e6, "problems": expected, "seconds": seconds})
    figures.add({"rows_per_s": rows / seconds})
    figures.add({"cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime})
    figures.add({"peak_mib": after.ru_maxrss / MIB})
    figures.add({"longest_line": max(map(len, lines)), "lines": len(lines)})
    figures.write()


if __name__ == "__main__":
    main()
