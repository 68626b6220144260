"""An hour of the local run with random kills -> build/bench/soak.json; ``make bench NAME=soak
ARGS='--minutes 60'``.

Every ``--every`` seconds on average (exponential), at any moment, one part of the job is killed
with SIGKILL: a rollout actor, the reward actor, the learner, Redis or the driver. ``--every 0``
kills nothing: whatever is replaced then was healthy. When the time is
over the job is asked to stop (SIGTERM, a checkpoint), then ends a few steps later by itself, so
that the books can be closed as in the chaos benchmark. The private memory of every process is
sampled meanwhile."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.telemetry.run_files import read_status
from benchmarks.chaos import Books, Job, Observer, check_books
from benchmarks.footprint import ROLES, Footprint
from benchmarks.harness import Figures, parser, smoke_recipe

#: Events of a run that say that a process was replaced.
REPLACED = ("rollout actor died", "rollout actor not placed", "learner died")
LAST_STEPS = 5  # of the life that ends by itself
ENDLESS = 1_000_000


class Soak:
    """Keeps the job alive and kills parts of it."""

    def __init__(
        self,
        job: Job,
        observer: Observer,
        rng: random.Random,
        every_s: float,
        roles: Sequence[str],
    ) -> None:
        self.job, self.observer, self.rng, self.every_s = job, observer, rng, every_s
        self.roles = roles
        self.killed: Counter[str] = Counter()
        self.unplanned = 0

    def run(self, deadline: float) -> None:
        """Kill until ``deadline``, at least once (``every_s`` 0: never), and nothing before the
        first step."""
        due = self._next_kill()
        while time.monotonic() < deadline or not (self.killed or self.every_s == 0):
            self._keep_alive()
            if time.monotonic() >= due and self.observer.books.commits:
                due = self._next_kill()
                self._kill(self.rng.choice(self.roles))
            time.sleep(0.2)

    def _next_kill(self) -> float:
        wait_s = self.rng.expovariate(1 / self.every_s) if self.every_s else math.inf
        return time.monotonic() + wait_s

    def stop(self) -> None:
        """As a scheduler asks a job to go away. Raises RuntimeError when it ends otherwise than
        saved."""
        self._keep_alive()
        self.job.process.send_signal(signal.SIGTERM)
        if code := self.job.process.wait(120):
            raise RuntimeError(f"SIGTERM ended the job with {code}: see {self.job.log}")

    def _kill(self, role: str) -> None:
        pid = self.job.pid_of(role) if self.job.running() else None
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)
        if role == "driver":
            self.job.process.wait()
            self.job.start()
        self.killed[role] += 1
        steps = self.observer.books.commits
        print(f"{time.strftime('%H:%M:%S')}  {role:<8} killed after {steps} commits", flush=True)

    def _keep_alive(self) -> None:
        if not self.job.running():
            self.unplanned += 1
            if self.unplanned > 3:
                raise RuntimeError(
                    f"the job ended by itself {self.unplanned} times: see {self.job.log}"
                )
            self.job.start()
        elif not self.observer.connected:
            self.job.look_for_redis()


def replaced_actors(run: Path) -> int:
    """Rollout actors and learner groups that the run replaced, for whatever reason."""
    rows = [json.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()]
    return sum(row["kind"] in REPLACED for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--minutes", type=float, default=60)
    options_of.add_argument(
        "--every", type=float, default=150, help="mean seconds between kills; 0: none"
    )
    options_of.add_argument("--roles", nargs="+", choices=tuple(ROLES), default=tuple(ROLES))
    options_of.add_argument("--recipe", type=Path, default=Path("recipes/local.yaml"))
    options_of.add_argument("--seed", type=int, default=0)
    options_of.add_argument("--work", type=Path, default=Path("build/soak"), help="for the run")
    options, overrides = options_of.parse_known_args(arguments)
    if options.smoke:
        options.minutes, options.every, options.roles = 0.01, 0.1, ["reward"]
        options.work, options.recipe = options.out, smoke_recipe(options.out)
    work: Path = options.work / time.strftime("soak-%Y%m%d-%H%M%S")
    work.mkdir(parents=True)
    # A small constant rate: the question is not what it learns but whether it lasts.
    fixed = ["--learner.schedule", "constant", "--learner.warmup", "0", "--screen", "plain"]
    fixed += ["--learner.optimizer.lr", "1.0e-5", "--checkpoint.every", "50"]
    fixed += ["--evaluation.every", "100", "--output.export", "false", *overrides]
    begin = [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(options.recipe), *fixed]
    places = ["--output.folder", str(work / "runs"), "--resume", "auto"]
    books, footprint = Books(), Footprint(ROLES)
    observer = Observer(books)
    started = time.monotonic()
    job = Job(
        [*begin, "--loop.steps", str(ENDLESS), *places],
        work / "runs",
        work / "soak.log",
        observer,
        footprint,
    )
    soak = Soak(job, observer, random.Random(options.seed), options.every, options.roles)
    try:
        soak.run(started + 60 * options.minutes)
        soak.stop()
        run = job.run_folder()
        assert run is not None
        steps = read_status(run).step + LAST_STEPS
        job.command = [*begin, "--loop.steps", str(steps), *places]
        job.start()
        while job.running():
            if not observer.connected:
                job.look_for_redis()
            time.sleep(0.2)
        if job.process.returncode:
            raise RuntimeError(f"the last life ended with {job.process.returncode}: see {job.log}")
    finally:
        observer.close()
        footprint.close()
        if job.running():
            job.process.send_signal(signal.SIGTERM)
            job.process.wait(120)
    figures = Figures("soak", options.out)
    figures.add({"minutes": (time.monotonic() - started) / 60, "steps": steps, "lives": job.lives})
    figures.add({"kills": sum(soak.killed.values()), "unplanned_exits": soak.unplanned})
    figures.add({"replaced_actors": replaced_actors(run)})
    figures.add({f"kills_{role}": count for role, count in sorted(soak.killed.items())})
    check_books(run, books, steps, figures)
    figures.add(footprint.figures())
    figures.write()


if __name__ == "__main__":
    main()
