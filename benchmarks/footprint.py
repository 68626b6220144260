"""Private memory of a run's processes -> build/bench/footprint.json; ``make bench NAME=footprint``.

How much each role holds, and whether it grows, while a recipe is trained. Chaos and soak sample
their jobs in the same way."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.harness import Figures, parser, smoke_recipe

#: How Ray names the workers; the driver is the process itself.
ROLES = {
    "rollout": "ray::RolloutActor",
    "reward": "ray::RewardActor",
    "learner": "ray::LearnerRank",
    "redis": "redis-server",
    "driver": "",
}

SETTLE_S = (
    240.0  # a process's first minutes, in which it fills its caches and its heap finds its size
)
LEAVE_S = 20.0  # its last seconds: a driver that ends in order draws plots then
SPAN_S = 120.0  # a slope over less than this says nothing


class Footprint:
    """Samples every descendant of a process whose command line names a role; ``close`` ends it."""

    def __init__(self, roles: Mapping[str, str], every_s: float = 5.0) -> None:
        self._roles, self._every_s = roles, every_s
        self._samples: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(
            list
        )  # (role, pid) -> (s, MiB)
        self._root: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def watch(self, root: int) -> None:
        """Look at this process, the driver, and what it started."""
        self._root = root

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _sample(self) -> None:
        while not self._stop.wait(self._every_s):
            now = time.monotonic()
            for role, process in processes(self._root, self._roles):
                try:
                    used = (
                        process.memory_full_info().uss / 2**20
                    )  # shared memory counts for nobody here
                except psutil.Error:
                    continue
                self._samples[role, process.pid].append((now, used))

    def figures(self) -> dict[str, float]:
        """Per role: the largest footprint in MiB, and how it grows within a life, in MiB an hour.

        The slope is one line through all lives, each with a level of its own, without ``SETTLE_S``
        and ``LEAVE_S``; ``memory_span_s`` is what it was seen over, all lives together,
        ``memory_longest_s`` the longest of them."""
        found: dict[str, float] = {}
        for role in sorted({role for role, _ in self._samples}):
            lives = [np.array(rows) for (name, _), rows in self._samples.items() if name == role]
            found[f"memory_mib_{role}"] = max(float(rows[:, 1].max()) for rows in lives)
            settled = [_settled(rows) for rows in lives]
            settled = [
                rows for rows in settled if len(rows) > 2 and rows[-1, 0] - rows[0, 0] >= SPAN_S
            ]
            if not settled:
                continue
            centred = np.concatenate([rows - rows.mean(axis=0) for rows in settled])
            spans = [float(rows[-1, 0] - rows[0, 0]) for rows in settled]
            slope = float(centred[:, 0] @ centred[:, 1] / (centred[:, 0] @ centred[:, 0]))
            found[f"memory_slope_mib_per_h_{role}"] = 3600 * slope
            found[f"memory_span_s_{role}"] = sum(spans)
            found[f"memory_longest_s_{role}"] = max(spans)
        return found


def _settled(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Samples (s, MiB) of a life without its beginning and its end."""
    return rows[(rows[:, 0] >= rows[0, 0] + SETTLE_S) & (rows[:, 0] <= rows[-1, 0] - LEAVE_S)]


def processes(root: int | None, roles: Mapping[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """The driver ``root`` and its descendants whose title holds a role's sign; nothing when it is
    gone."""
    if root is None:
        return
    try:
        driver = psutil.Process(root)
        children = driver.children(recursive=True)
    except psutil.Error:
        return
    yield "driver", driver
    for child in children:
        try:
            title = (child.cmdline() or [""])[0]
        except psutil.Error:
            continue
        role = next((role for role, sign in roles.items() if sign and sign in title), None)
        if role is not None:
            yield role, child


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--recipe", type=Path, default=Path("recipes/local.yaml"))
    options_of.add_argument("--every", type=float, default=1.0, help="seconds between samples")
    options, overrides = options_of.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = Path(name)
        recipe = smoke_recipe(folder) if options.smoke else options.recipe
        command = [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(recipe)]
        command += ["--output.folder", str(folder / "runs"), "--screen", "plain", *overrides]
        footprint = Footprint(ROLES, options.every)
        with open(folder / "run.log", "w+b") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                footprint.watch(process.pid)
                code = process.wait()
            finally:
                footprint.close()
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(60)
            log.seek(0)
            if code:
                raise RuntimeError(f"the run ended with {code}:\n{log.read()[-3000:].decode()}")
    figures = Figures("footprint", options.out)
    figures.add(footprint.figures())
    figures.write()


if __name__ == "__main__":
    main()
