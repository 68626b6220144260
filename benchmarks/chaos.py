"""Kills the parts of a real run again and again -> build/bench/chaos.json; ``make bench NAME=chaos
ARGS='--kills 50'``.

Two runs of one recipe: an undisturbed one, and one in which a rollout actor, the reward actor, the
learner, Redis or the whole job (the driver) is killed with SIGKILL while it idles, generates,
inserts, publishes or writes a checkpoint. A killed job is started again with ``--resume auto``, as
a scheduler would. At the end the books must close: nothing that was acknowledged lost, nothing
trained twice."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.buffer_service.redis.scripting import script
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.checkpoints.resume import saved_config
from avatar_rl.cluster.services.run_buffer import open_buffer
from avatar_rl.cluster.telemetry.run_files import list_runs, read_status
from benchmarks.footprint import ROLES, Footprint, processes
from benchmarks.harness import Figures, parser, smoke_recipe

PHASES = ("idle", "generating", "inserting", "publishing", "checkpointing")
SCRIPTS = ("push", "fresh", "insert", "draw", "commit", "snapshot")
PHASE_S = 60.0  # a phase that does not come in this time is not waited for any longer
SETTLE_STEPS = 2  # between a recovery and the next kill


@dataclass
class Books:
    """What an observer saw of the buffer, over all lives of the job."""

    acknowledged: set[str] = field(default_factory=set)  # groups that were inserted
    committed: dict[str, set[int]] = field(
        default_factory=lambda: defaultdict(set)
    )  # group -> steps that trained it
    commits: int = 0


class Observer:
    """Follows a Redis by MONITOR: every script that is run, as it is run. Reconnects; one life per
    socket."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.seen: dict[str, float] = {}  # script -> when it was last run
        self.lives = 0  # connections so far: one per life of Redis
        self.connected = False
        self.train_s = 0.3  # from the draw to the commit of a step
        self._names = {script(name).sha: name for name in SCRIPTS}
        self._socket: Path | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def watch(self, socket_path: Path | None) -> None:
        self._socket = socket_path

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def wait(self, name: str, deadline: float) -> bool:
        """Returns at the next run of a script; False past the deadline."""
        before = self.seen.get(name)
        with self._changed:
            return self._changed.wait_for(
                lambda: self.seen.get(name) != before, timeout=max(0.0, deadline - time.monotonic())
            )

    def _follow(self) -> None:
        while not self._stop.is_set():
            path = self._socket
            if path is None:
                time.sleep(0.1)
                continue
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(1.0)
                    connection.connect(str(path))
                    connection.sendall(b"MONITOR\r\n")
                    self.lives += 1
                    self.connected = True
                    self._read(connection, path)
            except OSError:
                time.sleep(0.05)
            finally:
                self.connected = False

    def _read(self, connection: socket.socket, path: Path) -> None:
        rest = b""
        while not self._stop.is_set() and self._socket == path:
            try:
                data = connection.recv(1 << 20)
            except TimeoutError:
                continue
            if not data:
                return
            *lines, rest = (rest + data).split(b"\r\n")
            for line in lines:
                if b'"EVALSHA" "' in line[:80] and b" lua]" not in line[:40]:
                    self._note(line)

    def _note(self, line: bytes) -> None:
        found = re.search(rb'"EVALSHA" "([0-9a-f]{40})"', line)
        name = self._names.get(found[1].decode()) if found else None
        if name is None or (name == "snapshot" and b'"begin"' not in line):
            return
        now = time.monotonic()
        if name == "insert" and (group := re.search(rb"\\xa8(\d{8})", line)):
            self.books.acknowledged.add(group[1].decode())
        if name == "commit":
            self.books.commits += 1
            words = [word.decode() for word in re.findall(rb'"([^"]*)"', line)][
                4:
            ]  # EVALSHA, sha, 1, prefix
            for group_id in words[3:]:
                self.books.committed[group_id].add(int(words[0]))
            if "draw" in self.seen:
                self.train_s = 0.7 * self.train_s + 0.3 * min(now - self.seen["draw"], 5.0)
        with self._changed:
            self.seen[name] = now
            self._changed.notify_all()


class Job:
    """`avatar train` as a scheduler runs it: started again with --resume auto when it was
    killed."""

    def __init__(
        self, command: list[str], runs: Path, log: Path, observer: Observer, footprint: Footprint
    ) -> None:
        self.command, self.runs, self.log, self.observer, self.footprint = (
            command,
            runs,
            log,
            observer,
            footprint,
        )
        self.lives = 0
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        self.lives += 1
        with open(self.log, "ab") as file:
            file.write(b"== life %d\n" % self.lives)
            self.process = subprocess.Popen(
                self.command,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.observer.watch(None)
        self.footprint.watch(self.process.pid)

    def running(self) -> bool:
        return self.process.poll() is None

    def run_folder(self) -> Path | None:
        runs = list_runs(self.runs)
        return self.runs / runs[0].run_id if runs else None

    def look_for_redis(self) -> None:
        """Tell the observer where this life's Redis is, once it is there."""
        folder = self.run_folder()
        if folder is None or read_status(folder).pid != self.process.pid:
            return
        lock = folder / "redis" / "lock"
        if lock.is_file() and (path := Path(lock.read_text().removeprefix("unix://"))).exists():
            self.observer.watch(path)

    def pid_of(self, role: str) -> int | None:
        return next(
            (found.pid for name, found in processes(self.process.pid, ROLES) if name == role), None
        )


class Chaos:
    """Kills by a plan, and times how long it takes until the next step is committed."""

    def __init__(
        self, job: Job, observer: Observer, rng: random.Random, roles: Sequence[str]
    ) -> None:
        self.job, self.observer, self.rng, self.roles = job, observer, rng, roles
        self.recovery: dict[str, list[float]] = defaultdict(list)
        self.killed: Counter[str] = Counter()
        self.unplanned = 0

    def run(self, kills: int, deadline: float) -> None:
        """Kill until ``kills`` are done, the time is over or the run has ended; then let it end."""
        plan = list(itertools.product(self.roles, PHASES))
        self.rng.shuffle(plan)
        for role, phase in itertools.islice(itertools.cycle(plan), kills):
            if time.monotonic() > deadline or not self._steps(SETTLE_STEPS, deadline):
                break
            self._await(phase)
            self._kill(role, phase, deadline)
        while not self._finished():
            self._keep_alive()
            time.sleep(0.5)

    def _finished(self) -> bool:
        return not self.job.running() and self.job.process.returncode == 0

    def _keep_alive(self) -> None:
        if self.job.running():
            if (
                not self.observer.connected
            ):  # what it was told may be the socket that a killed Redis left behind
                self.job.look_for_redis()
        elif self.job.process.returncode != 0:
            self.unplanned += 1
            if self.unplanned > 3:
                raise RuntimeError(
                    f"the job ended by itself {self.unplanned} times: see {self.job.log}"
                )
            self.job.start()

    def _steps(self, count: int, deadline: float) -> bool:
        """Wait for ``count`` commits; False when the run ended or the time is over."""
        goal = self.observer.books.commits + count
        while self.observer.books.commits < goal:
            if self._finished() or time.monotonic() > deadline + 120:
                return False
            self._keep_alive()
            time.sleep(0.01)
        return True

    def _await(self, phase: str) -> None:
        """Return in the middle of ``phase``; a phase that never comes is given up: the kill falls
        somewhere else."""
        observer, deadline = self.observer, time.monotonic() + PHASE_S
        if phase == "publishing":  # the weights go out shortly before the commit is seen
            observer.wait("draw", deadline)
            time.sleep(max(0.0, observer.train_s - self.rng.uniform(0.0, 0.08)))
            return
        name = {
            "idle": "push",
            "generating": "fresh",
            "inserting": "insert",
            "checkpointing": "snapshot",
        }[phase]
        observer.wait(name, deadline)
        time.sleep(
            self.rng.uniform(0.0, {"inserting": 0.005, "checkpointing": 0.05}.get(phase, 0.1))
        )

    def _kill(self, role: str, phase: str, deadline: float) -> None:
        pid = self.job.pid_of(role)
        if pid is None:  # it is being replaced: the next one on the plan
            return
        started, lives = time.monotonic(), self.observer.lives
        os.kill(pid, signal.SIGKILL)
        if role == "driver":
            self.job.process.wait()
            self.job.start()
        while role in ("driver", "redis") and self.observer.lives == lives and not self._finished():
            self._keep_alive()  # what the old Redis still says is no recovery
            time.sleep(0.01)
        if not self._steps(1, deadline):
            return
        seconds = time.monotonic() - started
        self.killed[f"{role}_{phase}"] += 1
        self.recovery[role].append(seconds)
        print(
            f"{sum(self.killed.values()):4d}  {role:<8} while {phase:<14} back after "
            f"{seconds:6.2f} s",
            flush=True,
        )


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def versions_monotone(run: Path) -> bool:
    """Versions only grow over the steps of the run that counts, whatever was run twice."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    versions = [row["version"] for row in rows if row.get("version") is not None]
    steps = [row["step"] for row in rows if row.get("version") is not None]
    return versions == sorted(set(versions)) and steps == sorted(set(steps))


def settled_groups(run: Path, buffer: ReplayBuffer) -> set[str]:
    """Ids of the groups that were inserted or dropped, by one bit each in Redis.

    ``buffer`` is open, so the server of ``run`` is up."""
    url = (run / "redis" / "lock").read_text().strip()
    connection = Connection(buffer.config, buffer.run_id, url)
    try:
        bits = connection.client.get(connection.key("seen")) or b""
    finally:
        connection.close()
    places = range(len(bits) * 8)
    return {f"{seq:08d}" for seq in places if bits[seq // 8] >> (7 - seq % 8) & 1}


def check_books(run: Path, books: Books, steps: int, figures: Figures) -> None:
    """Compare what was seen with what the buffer holds in the end."""
    recipe = saved_config(run)
    with open_buffer(str(run), url=None) as buffer:
        ledger = buffer.stats.ledger()
        settled = settled_groups(run, buffer)
    wanted = steps * recipe["loop"]["prompts_per_step"]
    twice = sum(len(found) > 1 for found in books.committed.values()) + max(
        0, ledger.trained_fresh - wanted
    )
    dropped = sum(ledger.dropped.values())
    figures.add(
        {
            "acknowledged": len(books.acknowledged),
            "acknowledged_lost": len(books.acknowledged - settled),
            "trained_twice": twice,
            "never_trained": wanted - ledger.trained_fresh - ledger.replay_only - dropped,
            "ledger_gap": ledger.gap,
            "duplicates": ledger.duplicates,
            "dropped": dropped,
            "versions_monotone": float(versions_monotone(run)),
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--kills", type=int, default=10)
    options_of.add_argument("--roles", nargs="+", choices=tuple(ROLES), default=tuple(ROLES))
    options_of.add_argument("--minutes", type=float, default=30, help="no kills after this long")
    options_of.add_argument("--steps", type=int, help="of both runs; default 6 a kill, at least 40")
    options_of.add_argument("--recipe", type=Path, default=Path("recipes/local.yaml"))
    options_of.add_argument("--seed", type=int, default=0, help="order of the kills")
    options_of.add_argument("--work", type=Path, default=Path("build/chaos"), help="for the runs")
    options_of.add_argument(
        "--reference", type=Path, help="an undisturbed run of as many steps; none: make one"
    )
    options, overrides = options_of.parse_known_args(arguments)
    if options.smoke:
        options.kills, options.roles, options.steps = 1, ["reward"], 12
        options.work, options.recipe = options.out, smoke_recipe(options.out)
    steps = options.steps or max(40, 6 * options.kills)
    work: Path = options.work / time.strftime("chaos-%Y%m%d-%H%M%S")
    work.mkdir(parents=True)
    fixed = ["--loop.steps", str(steps), "--screen", "plain", "--output.report", "false"]
    fixed += ["--output.export", "false", "--evaluation.every", "0", "--checkpoint.every", "5"]
    common = [sys.executable, "-m", "avatar_rl.cluster.cli", "train", str(options.recipe)]
    common += [*fixed, *overrides]
    figures = Figures("chaos", options.out)
    reference = options.reference or undisturbed(common, work / "undisturbed")
    books = Books()
    observer = Observer(books)
    command = [*common, "--output.folder", str(work / "chaos"), "--resume", "auto"]
    started = time.monotonic()
    footprint = Footprint(ROLES)
    job = Job(command, work / "chaos", work / "chaos.log", observer, footprint)
    chaos = Chaos(job, observer, random.Random(options.seed), options.roles)
    try:
        chaos.run(options.kills, started + 60 * options.minutes)
    finally:
        observer.close()
        footprint.close()
        if job.running():
            job.process.send_signal(signal.SIGTERM)
            job.process.wait(60)
    report(figures, chaos, job, started)
    figures.add(footprint.figures())
    run = job.run_folder()
    assert run is not None
    check_books(run, books, steps, figures)
    before, now = (read_status(folder).accuracy_now for folder in (reference, run))
    if before is not None and now is not None:
        figures.add({"accuracy_undisturbed": before, "accuracy_chaos": now})
        figures.add({"accuracy_difference": now - before})
    figures.write()


def undisturbed(common: list[str], folder: Path) -> Path:
    """The same recipe, uninterrupted."""
    print("an undisturbed run first", flush=True)
    folder.mkdir()
    with open(folder.with_suffix(".log"), "wb") as log:
        subprocess.run(
            [*common, "--output.folder", str(folder)], check=True, stdout=log, stderr=log
        )
    return folder / list_runs(folder)[0].run_id


def report(figures: Figures, chaos: Chaos, job: Job, started: float) -> None:
    minutes = (time.monotonic() - started) / 60
    figures.add({"kills": sum(chaos.killed.values()), "minutes": minutes, "lives": job.lives})
    figures.add({"unplanned_exits": chaos.unplanned})
    everything = [seconds for values in chaos.recovery.values() for seconds in values]
    for role, values in {**dict(sorted(chaos.recovery.items())), "all": everything}.items():
        if values:
            suffix = "" if role == "all" else f"_{role}"
            figures.add({f"recovery_s_p50{suffix}": statistics.median(values)})
            figures.add({f"recovery_s_p95{suffix}": percentile(values, 0.95)})
    figures.add({f"kills_{name}": count for name, count in sorted(chaos.killed.items())})


if __name__ == "__main__":
    main()
