"""Faults of a live Redis under a run's buffer: endured, or ended by name; nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.control import RunControl, StartBeats
from avatar_rl.buffer_service.records.requests import RequestLease
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.workers.supervision import StartWatch
from avatar_rl.common.errors import ReplayBufferError
from tests.buffer_records import CONFIG, make_group, requests

STEPS = 3  # whole ones before the fault
SHORT_S, LONG_S, START_S = 1.5, 4.0, 90.0
REWARDS = (0.0, 1.0, 0.0, 1.0)
Expected = Literal["recovered", "stopped"]


class NotEndured(Exception):
    """What was acknowledged is gone, and nobody said so."""


@dataclass
class World:
    """A run after some steps, with one group in the making."""

    server: EmbeddedRedis
    buffer: ReplayBuffer
    folder: Path
    client: redis.Redis = field(init=False)
    token: int = field(init=False)
    leased: list[RequestLease] = field(init=False)
    acknowledged: set[int] = field(default_factory=set)  # seqs of groups that were taken
    timers: list[threading.Timer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = redis.Redis.from_url(self.server.url)
        self.token = self.buffer.replay.new_fencing_token()
        for step in range(STEPS):
            self.begin(step)
            self.train(step)
        self.begin(STEPS, generated=1)

    def begin(self, step: int, generated: int = 2) -> None:
        """Ask two groups and generate some of them."""
        self.buffer.requests.push(requests(step))
        self.leased = self.buffer.requests.lease("actor", 2, max_staleness=0)
        for _ in range(generated):
            self.insert()

    def insert(self) -> None:
        lease = self.leased.pop()
        group = make_group(lease, REWARDS, version=lease.request.step)
        self.buffer.requests.add_group(group, lease, tokens_generated=24)
        self.acknowledged.add(lease.request.seq)

    def train(self, step: int) -> None:
        share = self.buffer.replay.lease_fresh("learner", step, fencing_token=self.token)
        if not share.ready:
            raise NotEndured(f"step {step} waits for groups that were taken")
        ids = [group.id for group in share.groups]
        self.buffer.replay.commit_step(step, step + 1, ids, self.token)

    def go_on(self) -> None:
        """The rest of the step, a whole step, a draw, and a look at the books.

        Raises NotEndured where less is there than was acknowledged."""
        try:
            while self.leased:
                self.insert()
            self.train(STEPS)
            self.begin(STEPS + 1)
            self.train(STEPS + 1)
            drawn = self.buffer.replay.draw(32, step=STEPS + 2, seed=0)
        except NotEndured:
            self.buffer.stats.check_ledger()  # a run looks every step; says what is gone
            raise
        books = self.buffer.stats.check_ledger()
        taken = len(self.acknowledged)
        if books.generated != taken or not drawn:
            raise NotEndured(f"{books.generated} of {taken} groups, {len(drawn)} drawn")

    def later(self, seconds: float, act: Callable[[], object]) -> None:
        self.timers.append(threading.Timer(seconds, act))
        self.timers[-1].start()

    def key(self, name: str) -> bytes:
        """The run's key of this name, which must be there."""
        keys = (bytes(key) for key in self.client.scan_iter())
        return next(key for key in keys if key.endswith(name.encode()))


Strike = Callable[[World], object]


@dataclass(frozen=True)
class Fault:
    """``words`` are due when the run ends by it."""

    strike: Strike
    expected: Expected
    words: tuple[str, ...] = ()
    settings: dict[str, float] = field(default_factory=dict)
    disk_mib: int = 0  # on a file system of its own of this size


# -- what is done to it --------------------------------------------------------------------------


def out_of_memory(seconds: float) -> Strike:
    def strike(world: World) -> None:
        world.client.config_set("maxmemory", 1)
        world.later(seconds, lambda: world.client.config_set("maxmemory", 0))

    return strike


def nearly_out_of_memory(world: World) -> None:
    """Above buffer.memory_limit, so that the buffer refuses before Redis does."""
    world.client.config_set("maxmemory", int(world.client.info("memory")["used_memory"] * 1.5))
    time.sleep(1.1)  # it looks once a second
    world.later(SHORT_S, lambda: world.client.config_set("maxmemory", 0))


def no_snapshot(seconds: float) -> Strike:
    """Redis takes no writes, since its last save to disk failed."""

    def strike(world: World) -> None:
        blocked = world.server.data_dir / "dump.rdb"
        (blocked / "full").mkdir(parents=True)  # no file can be renamed to it
        world.client.config_set("save", "3600 1000000")
        _save(world.client, "err")

        def give() -> None:
            (blocked / "full").rmdir()
            blocked.rmdir()
            _save(world.client, "ok")

        world.later(seconds, give)

    return strike


def _save(client: redis.Redis, until: str) -> None:
    while client.info("persistence")["rdb_last_bgsave_status"] != until:
        with contextlib.suppress(redis.exceptions.ResponseError):  # one is under way
            client.bgsave()
        time.sleep(0.05)


def disk_full(world: World) -> None:
    """Another program fills the disk of the append-only file, and frees it again."""
    filler = world.folder / "another-program"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    world.later(LONG_S, filler.unlink)


def frozen(seconds: float) -> Strike:
    def strike(world: World) -> None:
        pid = world.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        world.later(seconds, lambda: os.kill(pid, signal.SIGCONT))

    return strike


def crashed(world: World) -> None:
    world.server.kill()
    world.later(SHORT_S, world.server.start)


def gone(world: World) -> None:
    world.server.kill()


def restarted(world: World) -> None:
    world.server.stop()
    world.server.start()


def cut_off(world: World) -> None:
    world.client.client_kill_filter(_type="normal", skipme=True)


def locked(world: World) -> None:
    world.client.config_set("requirepass", "secret")
    cut_off(world)


def demoted(world: World) -> None:
    world.client.slaveof("127.0.0.1", 9)


def removed(*names: str) -> Strike:
    return lambda world: world.client.delete(*(world.key(name) for name in names))


def garbled(world: World) -> None:
    """A record on the disk that is no longer what was written: set aside, and counted."""
    [key] = [key for key in world.client.keys("*:t:00000001.2")]
    data = bytearray(bytes(world.client.get(key) or b""))
    data[-1] ^= 1
    world.client.set(key, bytes(data))


def frozen_actor(world: World) -> None:
    """An actor that sleeps past its lease: another generates, and the late group counts once."""
    requests = world.buffer.requests
    requests.release(world.leased)
    [late] = requests.lease("frozen", 1, 0.2, max_staleness=0)
    time.sleep(0.5)
    world.leased = requests.lease("actor", 1, max_staleness=0)
    world.insert()
    receipt = requests.add_group(make_group(late, REWARDS), late, tokens_generated=24)
    if receipt.status == "fresh":
        raise NotEndured("a group was taken twice")


def frozen_start(world: World) -> None:
    """A server that freezes while it starts again."""
    server = world.server
    server.kill()
    server.start_s = SHORT_S

    def freeze() -> None:
        while (pid := server.pid) is None:
            time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)

    freezer = threading.Thread(target=freeze)
    freezer.start()
    server.start()
    freezer.join()


class Starting:
    """A process that beats while it starts, and freezes in the middle of it."""

    def __init__(self, url: str, freezes: bool) -> None:
        beats = StartBeats(RunControl.at(BufferConfig(), "run", url), "rollout", "0")
        time.sleep(1.0)
        if freezes:
            os.kill(os.getpid(), signal.SIGSTOP)
        beats.end()

    def ready(self) -> str:
        return "ready"


def frozen_actor_start(world: World) -> None:
    """A rollout actor that freezes while it starts: ended by the watch, its successor starts."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        watch = StartWatch(world.buffer.control.watched_heartbeats, LONG_S)
        make = ray.remote(Starting).options(num_cpus=0)
        actor = make.remote(world.server.url, True)
        ready, began = actor.ready.remote(), time.monotonic()
        while not ray.wait([ready], timeout=0.5)[0]:
            watch.look({"rollout/0": actor})
            if time.monotonic() - began > START_S:
                raise NotEndured("a frozen start was not ended")
        with contextlib.suppress(ray.exceptions.RayActorError):
            raise NotEndured(f"a frozen start was {ray.get(ready)}")
        ray.get(make.remote(world.server.url, False).ready.remote(), timeout=START_S)
    finally:
        ray.shutdown()


AWAY = {"reconnect_s": 1.0, "timeout_s": 0.5}
GONE = ("keys", "removed or edited from outside", "resume from the last checkpoint")
NO_RUN = ("no run under", "resume from the last checkpoint")
FAULTS: dict[str, Fault] = {
    "out_of_memory": Fault(out_of_memory(SHORT_S), "recovered"),
    "nearly_out_of_memory": Fault(nearly_out_of_memory, "recovered", (), {"memory_limit": 0.5}),
    "out_of_memory_for_good": Fault(
        out_of_memory(LONG_S), "stopped", ("out of memory", "raise maxmemory"), {"pause_s": 1.0}
    ),
    "no_snapshot": Fault(no_snapshot(SHORT_S), "recovered"),
    "no_snapshot_for_good": Fault(
        no_snapshot(LONG_S), "stopped", ("refuses writes", "free its disk"), {"pause_s": 1.0}
    ),
    "disk_full": Fault(disk_full, "recovered", disk_mib=4),
    "frozen": Fault(frozen(SHORT_S), "recovered"),
    "frozen_past_timeout": Fault(frozen(SHORT_S), "recovered", (), {"timeout_s": 0.5}),
    "frozen_for_good": Fault(frozen(LONG_S), "stopped", ("does not answer",), AWAY),
    "crashed": Fault(crashed, "recovered"),
    "gone": Fault(gone, "stopped", ("does not answer", "is Redis running there?"), AWAY),
    "frozen_start": Fault(frozen_start, "stopped", ("did not serve within", "redis.log")),
    "restarted": Fault(restarted, "recovered"),
    "frozen_actor_start": Fault(frozen_actor_start, "recovered"),
    "cut_off": Fault(cut_off, "recovered"),
    "scripts_flushed": Fault(lambda world: world.client.script_flush(), "recovered"),
    "locked": Fault(locked, "stopped", ("refuses this login", "check username, password")),
    "demoted": Fault(demoted, "stopped", ("read-only replica", "URL of the primary")),
    "garbled_record": Fault(garbled, "recovered"),
    "frozen_actor": Fault(frozen_actor, "recovered"),
    "flushdb": Fault(lambda world: world.client.flushdb(), "stopped", NO_RUN),
    "flushall": Fault(lambda world: world.client.flushall(), "stopped", NO_RUN),
    "meta_removed": Fault(removed(":meta"), "stopped", NO_RUN),
    **{
        f"{name.replace(':', '_')}_removed": Fault(removed(f":{name}"), "stopped", GONE)
        for name in (
            *("ledger", "seen", "stock:v", "stock:f", "stock:s", "trajs", "prompts", "rank"),
            *("fresh", "groups", "steps"),
        )
    },
    "tickets_removed": Fault(
        removed(":tickets"), "stopped", ("has no request in this run", "push the request first")
    ),
    "leases_removed": Fault(removed(":leased"), "recovered"),
    "record_removed": Fault(removed(":t:00000001.2"), "recovered"),
    "record_of_fresh_removed": Fault(removed(":t:00000007.1"), "recovered"),
}


# -- how it ended --------------------------------------------------------------------------------


@contextlib.contextmanager
def world_of(fault: Fault, folder: Path) -> Iterator[World]:
    folder.mkdir()
    config = BufferConfig.model_validate(
        CONFIG.model_dump() | {"reconnect_s": 20.0, "pause_s": 20.0} | fault.settings
    )
    with contextlib.ExitStack() as stack:
        if fault.disk_mib:
            size = f"size={fault.disk_mib}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        server = stack.enter_context(EmbeddedRedis(folder / "redis"))
        buffer = stack.enter_context(ReplayBuffer.connect(config, "run", server.url))
        world = World(server, buffer, folder)
        yield world
        for timer in world.timers:
            timer.join()


def outcome(fault: Fault, folder: Path) -> tuple[Expected | Literal["lost"], str]:
    """How a run ended under ``fault``, and why."""
    with world_of(fault, folder) as world:
        try:
            fault.strike(world)
            world.go_on()
        except ReplayBufferError as error:
            return "stopped", str(error)
        except Exception:  # NotEndured, or an error that nobody has named
            return "lost", traceback.format_exc()
        return "recovered", ""


def mountable(folder: Path) -> bool:
    """Whether this user may mount a file system."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def endured(faults: dict[str, Fault], folder: Path) -> dict[str, float]:
    """Counts of how runs ended; one that ends otherwise than is due counts as lost."""
    ends: list[str] = []
    may_mount = mountable(folder / "mount")
    for name, fault in faults.items():
        if fault.disk_mib and not may_mount:
            print(f"fault {name}: left out, this user may not mount a file system")
            continue
        end, why = outcome(fault, folder / name)
        if end != fault.expected or not _has(why, fault.words):
            print(
                f"fault {name}: {end}, not {fault.expected} {fault.words}: {why}", file=sys.stderr
            )
            end = "lost"
        ends.append(end)
    return {
        "faults": len(ends),
        "recovered": ends.count("recovered"),
        "stopped_by_name": ends.count("stopped"),
        "lost": ends.count("lost"),
    }


def _has(text: str, words: Sequence[str]) -> bool:
    return all(word.lower() in text.lower() for word in words)
