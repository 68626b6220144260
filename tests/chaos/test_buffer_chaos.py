"""Writers, readers and Redis killed at random: nothing acknowledged is lost, nothing counts twice,
the ledger balances.

16 writer processes lease, generate and insert; 4 readers draw; one learner process commits. All of
them and Redis (AOF always) get SIGKILL at random for AVATAR_CHAOS_S seconds (60)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.errors import StepTrainedError
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from tests.buffer_records import make_group

pytestmark = pytest.mark.chaos
SECONDS = float(os.environ.get("AVATAR_CHAOS_S", "60"))
WRITERS, READERS, PER_STEP = 16, 4, 8
CONFIG = BufferConfig(
    capacity=400, warm_up=32, reconnect_s=30.0, max_reuse=20, max_age_versions=200
)


def log(path: Path, line: str) -> None:
    """One line by one write, on disk before the next thing is done."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def writer(buffer: ReplayBuffer, name: str, out: Path) -> None:
    while True:
        leases = buffer.requests.lease(name, 2, lease_s=1.0, max_staleness=2)
        if not leases:
            time.sleep(0.02)
        for lease in leases:
            if lease.request.seq % 97 == 13:
                if buffer.requests.quarantine(lease, "undecodable"):
                    log(out, f"dropped {lease.request.seq}")
                continue
            rewards = [float((lease.request.seq * 7 + i) % 3 == 0) for i in range(4)]
            group = make_group(lease, rewards, tokens=64, version=lease.request.step)
            receipt = buffer.requests.add_group(group, lease, tokens_generated=256)
            log(out, f"{receipt.status} {group.seq}")


def reader(buffer: ReplayBuffer, name: str, out: Path) -> None:
    seed = 0
    while True:
        stats = buffer.stats.read()
        seed += 1
        try:
            drawn = buffer.replay.draw(16, step=stats.trained_step + 1, seed=seed)
        except StepTrainedError:  # the learner was quicker
            log(out, "retry")
            continue
        assert len({t.id for t in drawn}) == len(drawn)
        assert all(t.step <= stats.trained_step + 1 for t in drawn)


def learner(buffer: ReplayBuffer, name: str, out: Path) -> None:
    fencing_token = buffer.replay.new_fencing_token()
    while True:
        step = buffer.stats.read().trained_step + 1
        first = step * PER_STEP
        ahead = [
            RolloutRequest(
                seq=first + i, prompt_id=f"p{(first + i) % 60}", step=step + i // PER_STEP, n=4
            )
            for i in range(3 * PER_STEP)
        ]
        buffer.requests.push(ahead)
        share = buffer.replay.lease_fresh(name, step, fencing_token=fencing_token)
        if not share.ready:
            time.sleep(0.01)
            continue
        gids = [g.id for g in share.groups]
        if buffer.replay.commit_step(step, step + 1, gids, fencing_token).committed:
            log(out, f"trained {step} {' '.join(gids)}")


def work(role: str, name: str, url: str, out: str) -> None:
    buffer = ReplayBuffer.connect(CONFIG, "chaos", url)
    {"writer": writer, "reader": reader, "learner": learner}[role](buffer, name, Path(out))


class Crew:
    """The client processes; the dead are replaced."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder, self.born, self.kills = url, folder, 0, 0
        self.alive: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
        for role, n in (("learner", 1), ("writer", WRITERS), ("reader", READERS)):
            for _ in range(n):
                self.start(role)

    def start(self, role: str) -> None:
        self.born += 1
        name = f"{role}-{self.born}"
        errors = (self.folder / f"{name}.err").open("wb")
        command = [
            sys.executable,
            "-m",
            "tests.chaos.test_buffer_chaos",
            role,
            name,
            self.url,
            str(self.folder / name),
        ]
        self.alive[name] = (role, subprocess.Popen(command, stderr=errors))
        errors.close()

    def check(self) -> None:
        for name, (_, process) in self.alive.items():
            if process.poll() is not None:
                pytest.fail(
                    f"{name} died by itself: {(self.folder / f'{name}.err').read_text()[-2000:]}"
                )

    def kill_one(self) -> None:
        name = random.choice(sorted(self.alive))
        role, process = self.alive.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.kills += 1
        self.start(role)

    def stop(self) -> None:
        for _, process in self.alive.values():
            process.kill()
            process.wait()

    def said(self, role: str) -> list[list[str]]:
        found = []
        for path in self.folder.glob(f"{role}-*"):
            if path.suffix != ".err":
                # A line that was cut by a kill was never acknowledged to anybody.
                found += [
                    line.split()
                    for line in path.read_text().splitlines(keepends=True)
                    if line.endswith("\n")
                ]
        return found


@pytest.mark.timeout(int(SECONDS) + 180)
def test_nothing_is_lost_or_doubled_under_kill_9(tmp_path: Path) -> None:
    random.seed(5)
    crew_folder = tmp_path / "crew"
    crew_folder.mkdir()
    with EmbeddedRedis(tmp_path / "redis", appendfsync="always") as server:
        buffer = ReplayBuffer.connect(CONFIG, "chaos", server.url)
        crew = Crew(server.url, crew_folder)
        redis_kills = 0
        end = time.monotonic() + SECONDS
        last_version = 0
        try:
            while time.monotonic() < end:
                time.sleep(random.uniform(0.2, 1.2))
                crew.check()
                if random.random() < 0.25:
                    server.kill()
                    time.sleep(random.uniform(0, 0.3))
                    server.start()
                    redis_kills += 1
                else:
                    crew.kill_one()
                version = buffer.replay.version()
                assert version >= last_version
                last_version = version
        finally:
            crew.stop()
        verdict(buffer, crew, redis_kills)


def verdict(buffer: ReplayBuffer, crew: Crew, redis_kills: int) -> None:
    books = buffer.stats.check_ledger()
    stats = buffer.stats.read()
    client = redis.Redis.from_url(buffer._connection.url)
    key = buffer._connection.key

    accepted = {
        int(seq) for status, seq in crew.said("writer") if status in ("fresh", "late", "dropped")
    }
    seen = {seq for seq in range(max(accepted) + 1) if client.getbit(key("seen"), seq)}
    lost = accepted - seen
    times_accepted = [
        int(seq) for status, seq in crew.said("writer") if status in ("fresh", "late", "dropped")
    ]
    doubled = len(times_accepted) - len(set(times_accepted))

    trained = [gid for words in crew.said("learner") for gid in words[2:]]
    steps = [int(words[1]) for words in crew.said("learner")]
    fresh = {gid.decode() for gid in client.zrange(key("fresh"), 0, -1)}
    figures = {
        "kills": crew.kills,
        "redis_kills": redis_kills,
        "groups": books.generated,
        "steps": stats.trained_step + 1,
        "acknowledged_lost": len(lost),
        "duplicated": doubled + len(trained) - len(set(trained)),
        "ledger_gap": books.gap,
    }
    print(json.dumps(figures))
    assert not lost and not doubled
    assert (
        client.bitcount(key("seen")) == books.generated
    )  # every settled request is in the books once
    assert (
        len(trained) == len(set(trained))
        and len(steps) == len(set(steps))
        and not fresh & set(trained)
    )
    assert (
        len(set(trained)) <= books.trained_fresh
    )  # a learner may die between its commit and its own log
    assert stats.stock == len(buffer_ids(client, key("stock:f"))) + len(
        buffer_ids(client, key("stock:s"))
    )
    assert stats.stock <= CONFIG.capacity and stats.stock == client.hlen(key("trajs"))
    assert all(client.exists(key(f"t:{tid}")) for tid in buffer_ids(client, key("stock:v")))
    assert stats.quarantined_records == 0 and stats.trained_step > 20 and redis_kills > 0


def buffer_ids(client: redis.Redis, key: str) -> list[str]:
    return [tid.decode() for tid in client.zrange(key, 0, -1)]


if __name__ == "__main__":
    work(*sys.argv[1:])
