"""The files behind one training step -> build/bench/step_files.json; ``make bench
NAME=step_files``, two minutes.

A tiny run is started as a user starts it, and every process of it records when which file of the
product executes a statement (`line_recorder`). One step is what lies between the rows of two warm
steps in metrics.jsonl; no evaluation, checkpoint or sample is due there. ``files`` is the median
over the warm steps. The rooms and their files are printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from avatar_rl.cluster.telemetry.run_files import list_runs, read_metrics
from benchmarks.harness import Figures, parser, smoke_recipe
from benchmarks.line_recorder.sitecustomize import BUCKET_S

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "prompts", "buffer_service", "rewards", "actors", "learner", "cluster")
#: Steps whose successors count: by then the buffer is warm and every import is done.
WARM = 3
DEADLINE_S = 600.0

Lines = dict[Path, set[int]]  # executed, by file


def train(folder: Path, steps: int, overrides: Sequence[str]) -> Path:
    """A recorded run; returns its folder. Raises RuntimeError with the end of a failed run's
    output."""
    recipe = smoke_recipe(folder)
    records = folder / "records"
    records.mkdir()
    places = [str(ROOT / "benchmarks" / "line_recorder"), str(ROOT)]
    places.append(os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "STEP_FILES_ROOTS": os.pathsep.join(str(ROOT / room) for room in ROOMS),
        "STEP_FILES_OUT": str(records),
    }
    command = [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(recipe)]
    command += ["--loop.steps", str(steps), "--evaluation.every", "0", "--checkpoint.every", "1000"]
    command += ["--output.samples_every", "0", "--output.report", "false"]
    command += ["--output.export", "false", "--output.folder", str(folder / "runs"), *overrides]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{output[-3000:]}")
    return folder / "runs" / list_runs(folder / "runs")[0].run_id


def read_records(folder: Path) -> dict[Path, dict[int, set[int]]]:
    """Lines executed by file and moment (in units of ``BUCKET_S``), in any process."""
    found: dict[Path, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in folder.glob("*.jsonl"):
        for row in path.read_text().splitlines():
            for file, numbers in json.loads(row).items():
                moments = found[Path(file).relative_to(ROOT)]
                for bucket, line in zip(numbers[::2], numbers[1::2], strict=True):
                    moments[bucket].add(line)
    return found


def steps_of(run: Path, records: Mapping[Path, Mapping[int, set[int]]]) -> list[Lines]:
    """For each warm step the files with a statement executed, and which lines."""
    times = {row["step"]: row["timestamp"] for row in read_metrics(run)}
    found = []
    for step in sorted(times):
        begin, end = times.get(step - 1), times[step]
        if step <= WARM or begin is None or end is None:
            continue
        window = range(int(begin / BUCKET_S), int(end / BUCKET_S))
        executed = {
            file: set().union(*(lines for moment, lines in moments.items() if moment in window))
            for file, moments in records.items()
        }
        found.append({file: lines for file, lines in executed.items() if lines})
    return found


def length(file: Path) -> int:
    return len((ROOT / file).read_text().splitlines())


def show(step: Lines) -> None:
    """The files by room: how many statements were executed, and the lines of the file."""
    for room in ROOMS:
        files = sorted(file for file in step if file.parts[0] == room)
        print(f"{room}: {len(files)} files")
        for file in files:
            print(f"  {file!s:48s} {len(step[file]):4d} of {length(file):4d}")


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--steps", type=int, default=12, help="of the run; the first are cold")
    options, overrides = options_of.parse_known_args(arguments)
    steps = WARM + 2 if options.smoke else options.steps
    figures = Figures("step_files", options.out)
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        run = train(Path(name), steps, overrides)
        found = steps_of(run, read_records(Path(name) / "records"))
    if not found:
        raise RuntimeError(f"no step after step {WARM} was seen: run more --steps")
    typical = sorted(found, key=len)[(len(found) - 1) // 2]
    show(typical)
    counts = [len(step) for step in found]
    figures.add({"files": len(typical), "lines": sum(map(length, typical)), "steps": len(found)})
    figures.add({"statements": sum(map(len, typical.values()))})
    figures.add({"files_low": min(counts), "files_high": max(counts)})
    figures.add({"files_any_step": len({file for step in found for file in step})})
    for room in ROOMS:
        figures.add({f"files_{room}": sum(file.parts[0] == room for file in typical)})
    figures.write()


if __name__ == "__main__":
    main()
