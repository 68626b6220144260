"""Replay buffer figures -> build/bench/buffer.json: against raw Redis, growth to a million prompts,
memory, AOF modes.

Run with ``make bench NAME=buffer``; about one minute. Every ratio compares two things timed by
turns in the same process."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis

from avatar_rl.buffer_service.config import AppendFsync, BufferConfig
from avatar_rl.buffer_service.records.codec import encode
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.redis.wire import pack
from avatar_rl.buffer_service.store import ReplayBuffer

Times = list[float]
GROUP, TOKENS, DRAW = 8, 512, 64


def group_for(
    lease: RequestLease, rng: np.random.Generator, *, n: int = GROUP, tokens: int = TOKENS
) -> Group:
    """A group with random contents and a success rate that depends on the prompt."""
    t = lease.request
    gid = f"{t.seq:08d}"
    rate = (zlib.crc32(t.prompt_id.encode()) % 97) / 97
    members = tuple(
        Trajectory(
            id=f"{gid}.{i}",
            group_id=gid,
            prompt_id=t.prompt_id,
            index=i,
            hinted=False,
            prompt_tokens=700,
            prompt_digest=12345,
            token_ids=rng.integers(0, 150_000, tokens, dtype=np.int32),
            logprobs=-rng.random(tokens, dtype=np.float32),
            versions=((0, tokens),),
            finish_reason="stop",
            temperature=1.0,
            reward=reward,
            components={"format": 1.0, "accuracy": reward},
            step=t.step,
        )
        for i, reward in enumerate((rng.random(n) < rate).astype(float).tolist())
    )
    return Group(
        id=gid, prompt_id=t.prompt_id, seq=t.seq, step=t.step, hinted=False, trajectories=members
    )


class Bench:
    """One run of the buffer with a stream of requests over ``prompts`` prompts."""

    def __init__(self, url: str, name: str, *, capacity: int, prompts: int) -> None:
        self.config = BufferConfig(capacity=capacity, warm_up=0)
        self.buffer = ReplayBuffer.connect(self.config, name, url)
        self.raw = (
            self.buffer._connection.client
        )  # redis-py as it is, with the options of the buffer
        self.wire = self.buffer._connection._wire  # the buffer's own short way, by itself
        self.epoch = self.buffer.replay.new_fencing_token()
        self.prompts, self.seq, self.step = prompts, 0, 0
        self.rng = np.random.default_rng(1)

    def leases(self, n: int, *, stride: int = 1) -> list[RequestLease]:
        """``n`` leased requests of the present step, prompts spread over the whole set."""
        at = [((self.seq + i) * stride) % self.prompts for i in range(n)]
        self.buffer.requests.push(
            [
                RolloutRequest(
                    seq=self.seq + i, prompt_id=f"prompt-{p:07d}", step=self.step, n=GROUP
                )
                for i, p in enumerate(at)
            ]
        )
        self.seq += n
        found: list[RequestLease] = []
        while len(found) < n:
            found += self.buffer.requests.lease("bench", n - len(found), 3600)
        return found

    def commit(self) -> None:
        gids = [g.decode() for g in self.raw.zrange(self.buffer._connection.key("fresh"), 0, -1)]
        self.buffer.replay.commit_step(self.step, self.step + 1, gids, self.epoch)
        self.step += 1

    def fill(self, trajectories: int, *, tokens: int = TOKENS, n: int = GROUP) -> None:
        for first in range(0, trajectories // n, 250):
            for lease in self.leases(min(250, trajectories // n - first), stride=7919):
                group = group_for(lease, self.rng, tokens=tokens, n=n)
                self.buffer.requests.add_group(group, lease, tokens_generated=tokens * n)
            self.commit()

    def seed_prompts(self) -> None:
        """Statistics of all prompts at once, written as the scripts write them, so that a million
        take a minute."""
        key = self.buffer._connection.key
        total = 0
        scale = 1 << 28
        for first in range(0, self.prompts, 5000):
            states: dict[str | bytes, bytes | float | int | str] = {}
            ranks: dict[str | bytes, bytes | float | int | str] = {}
            for p in range(first, min(first + 5000, self.prompts)):
                rbar = int(((p * 7919) % 1_000_003) / 1_000_003 * scale) / scale
                total += int(rbar * scale)
                pid = f"prompt-{p:07d}"
                visits = [[p + k, *[rbar] * 8] for k in range(3)]
                states[pid] = msgspec.msgpack.encode([rbar, False, visits, [], 0, 0, 0, 0])
                ranks[pid] = rbar
            with self.raw.pipeline(transaction=False) as pipe:
                pipe.hset(key("prompts"), mapping=states)
                pipe.zadd(key("rank"), ranks)
                pipe.execute()
        self.raw.hset(key("meta"), "rbar_sum", total)

    def insert_times(self, n: int, stride: int = 7919) -> Times:
        work = [(lease, group_for(lease, self.rng)) for lease in self.leases(n, stride=stride)]
        times = []
        for lease, group in work:
            begin = time.perf_counter()
            self.buffer.requests.add_group(group, lease, tokens_generated=GROUP * TOKENS)
            times.append(time.perf_counter() - begin)
        return times

    def raw_insert_times(self, n: int) -> Times:
        """A plain pipelined client: SET of the same bytes, encoded beforehand, in one round
        trip."""
        request = RolloutRequest(seq=0, prompt_id="raw", step=0, n=GROUP)
        lease = RequestLease(request=request, attempt=1, consumer="raw", hinted=False)
        groups = [[encode(t) for t in group_for(lease, self.rng).trajectories] for _ in range(n)]
        times = []
        for i in range(n):
            begin = time.perf_counter()
            pipe = self.raw.pipeline(transaction=False)
            for j, data in enumerate(groups[i]):
                pipe.set(f"raw:{i}:{j}", data)
            pipe.execute()
            times.append(time.perf_counter() - begin)
        self.raw.unlink(*[f"raw:{i}:{j}" for i in range(n) for j in range(GROUP)])
        return times

    def wire_insert_times(self, n: int) -> Times:
        """The same bytes in one MSET by the buffer's own wire, encoded beforehand."""
        request = RolloutRequest(seq=0, prompt_id="raw", step=0, n=GROUP)
        lease = RequestLease(request=request, attempt=1, consumer="raw", hinted=False)
        groups = [[encode(t) for t in group_for(lease, self.rng).trajectories] for _ in range(n)]
        times = []
        for i in range(n):
            begin = time.perf_counter()
            pairs = [word for j, data in enumerate(groups[i]) for word in (f"raw:{i}:{j}", data)]
            self.wire.ask(pack("MSET", *pairs))
            times.append(time.perf_counter() - begin)
        self.raw.unlink(*[f"raw:{i}:{j}" for i in range(n) for j in range(GROUP)])
        return times

    def draw_times(self, n: int, first_seed: int = 0) -> Times:
        times = []
        for seed in range(first_seed, first_seed + n):
            begin = time.perf_counter()
            drawn = self.buffer.replay.draw(DRAW, step=self.step, seed=seed)
            times.append(time.perf_counter() - begin)
            assert len(drawn) == DRAW
        return times

    def chosen(self, n: int, first_seed: int) -> list[list[str]]:
        """The ids that draws return; made long before they are read, so that they are in no cache
        by then."""
        return [
            [t.id for t in self.buffer.replay.draw(DRAW, step=self.step, seed=first_seed + i)]
            for i in range(n)
        ]

    def raw_draw_times(self, chosen: list[list[str]]) -> Times:
        """Plain MGET of the values of draws; nothing is decoded."""
        times = []
        for keys in [[self.buffer._connection.key(f"t:{tid}") for tid in ids] for ids in chosen]:
            begin = time.perf_counter()
            self.raw.mget(keys)
            times.append(time.perf_counter() - begin)
        return times

    def wire_draw_times(self, chosen: list[list[str]]) -> Times:
        """The values of draws read by the buffer's own wire; nothing is decoded."""
        times = []
        for ids in chosen:
            begin = time.perf_counter()
            self.buffer._connection.read_values(ids, _forget)
            times.append(time.perf_counter() - begin)
        return times


def _forget(*_: object) -> None:
    pass


def memory(raw: redis.Redis) -> int:
    return int(raw.info("memory")["used_memory"])


def by_turns(measured: Sequence[Callable[[int], Times]], rounds: int) -> list[Times]:
    """Each by turns, given the round, so that a noisy moment hits all."""
    times: list[Times] = [[] for _ in measured]
    for i in range(rounds):
        for found, measure in zip(times, measured, strict=True):
            found += measure(i)
    return times


def rate(times: Sequence[float]) -> float:
    """Calls per second from the median, which a neighbour on the machine cannot spoil."""
    return 1 / statistics.median(times)


def against_raw(folder: Path, quick: bool) -> Iterator[tuple[str, float]]:
    with EmbeddedRedis(folder / "raw", persistent=False) as server:
        bench = Bench(server.url, "ratios", capacity=10_000, prompts=2000)
        bench.fill(2000 if quick else 10_000)
        rounds = 4 if quick else 20
        ours, raw, wire = by_turns(
            [
                lambda _: bench.insert_times(50),
                lambda _: bench.raw_insert_times(50),
                lambda _: bench.wire_insert_times(50),
            ],
            rounds,
        )
        bench.commit()
        yield "insert_per_s", rate(ours)
        yield "raw_insert_per_s", rate(raw)
        yield "wire_insert_per_s", rate(wire)
        yield "insert_ratio", rate(ours) / rate(raw)
        yield "insert_wire_ratio", rate(ours) / rate(wire)
        yield "insert_p99_ms", float(np.percentile(ours, 99)) * 1e3
        for_raw, for_wire = (
            [bench.chosen(20, 20 * (rounds * k + i)) for i in range(rounds)] for k in (1, 2)
        )
        ours, raw, wire = by_turns(
            [
                lambda i: bench.draw_times(20, 20 * i),
                lambda i: bench.raw_draw_times(for_raw[i]),
                lambda i: bench.wire_draw_times(for_wire[i]),
            ],
            rounds,
        )
        yield "draw_per_s", rate(ours)
        yield "raw_mget_per_s", rate(raw)
        yield "wire_mget_per_s", rate(wire)
        yield "draw_ratio", rate(ours) / rate(raw)
        yield "draw_wire_ratio", rate(ours) / rate(wire)
        yield "draw_p99_ms", float(np.percentile(ours, 99)) * 1e3


def growth(folder: Path, quick: bool) -> Iterator[tuple[str, float]]:
    """Time per call at many prompts and trajectories over that at few; the two servers are measured
    by turns."""
    prompts, stock = (50_000, 10_000) if quick else (1_000_000, 100_000)
    with (
        EmbeddedRedis(folder / "few", persistent=False) as a,
        EmbeddedRedis(folder / "many", persistent=False) as b,
    ):
        few = Bench(a.url, "few", capacity=1000, prompts=1000)
        many = Bench(b.url, "many", capacity=stock, prompts=prompts)
        for bench in (few, many):
            bench.seed_prompts()
            bench.fill(bench.config.capacity)
        yield "million_prompts", many.buffer.stats.read().prompts
        yield "million_stock", many.buffer.stats.read().stock
        yield "memory_million_mib", memory(many.raw) / 2**20
        rounds = 4 if quick else 16
        small, large = by_turns(
            [lambda _: few.insert_times(50), lambda _: many.insert_times(50)], rounds
        )
        few.commit()
        many.commit()
        yield "growth_insert", statistics.median(large) / statistics.median(small)
        small, large = by_turns(
            [lambda _: few.draw_times(30), lambda _: many.draw_times(30)], rounds
        )
        yield "growth_draw", statistics.median(large) / statistics.median(small)
        yield "stats_ms_million", _timed(many.buffer.stats.read) * 1e3
        yield from snapshot_figures(many, folder)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def take_snapshot(url: str, capacity: int, out: Path, took: Any) -> None:
    with ReplayBuffer.connect(BufferConfig(capacity=capacity, warm_up=0), "many", url) as buffer:
        took.value = _timed(lambda: buffer.snapshot(out))


def snapshot_figures(bench: Bench, folder: Path) -> Iterator[tuple[str, float]]:
    """The longest any other client had to wait while a snapshot was taken, and the same without
    one."""

    def longest(until: Callable[[], bool]) -> float:
        raw, worst = redis.Redis.from_url(bench.buffer._connection.url), 0.0
        while not until():
            worst = max(worst, _timed(raw.ping))
            time.sleep(0.0005)
        return worst

    deadline = time.perf_counter() + 3
    yield "idle_block_ms", longest(lambda: time.perf_counter() > deadline) * 1e3
    out = folder / "snapshot.bin"
    context = multiprocessing.get_context(
        "spawn"
    )  # a process of its own, as a thread would hold up our clock too
    took = context.Value("d", 0.0)
    child = context.Process(
        target=take_snapshot, args=(bench.buffer._connection.url, bench.config.capacity, out, took)
    )
    bench.raw.config_set("slowlog-log-slower-than", 100)
    bench.raw.config_set("slowlog-max-len", 20_000)
    bench.raw.slowlog_reset()
    child.start()
    yield "snapshot_block_ms", longest(lambda: not child.is_alive()) * 1e3
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the snapshot process ended with {child.exitcode}")
    yield "snapshot_s", took.value
    yield "snapshot_mib", out.stat().st_size / 2**20
    slow = [int(entry["duration"]) for entry in bench.raw.slowlog_get(20_000)]  # microseconds
    yield "snapshot_slowest_command_ms", max(slow, default=0) / 1e3


def footprint(folder: Path, quick: bool) -> Iterator[tuple[str, float]]:
    n = 1000 if quick else 10_000
    with EmbeddedRedis(folder / "memory", persistent=False) as server:
        empty = memory(redis.Redis.from_url(server.url))
        bench = Bench(server.url, "memory", capacity=4 * n, prompts=2000)
        bench.fill(n, tokens=1000)
        lease = RequestLease(
            request=RolloutRequest(seq=1, prompt_id="prompt-0000001", step=0, n=1),
            attempt=1,
            consumer="x",
            hinted=False,
        )
        yield (
            "record_bytes",
            len(encode(group_for(lease, bench.rng, n=1, tokens=1000).trajectories[0])),
        )
        yield "bytes_per_trajectory", (memory(bench.raw) - empty) / bench.buffer.stats.read().stock
        yield "memory_10k_mib", memory(bench.raw) / 2**20 * (10_000 / n)


def aof_modes(folder: Path, quick: bool) -> Iterator[tuple[str, float]]:
    modes: list[tuple[str, bool, AppendFsync]] = [("none", False, "no"), ("no", True, "no")]
    modes += [("everysec", True, "everysec"), ("always", True, "always")]
    for name, persistent, fsync in modes:
        with EmbeddedRedis(
            folder / f"aof-{name}", appendfsync=fsync, persistent=persistent
        ) as server:
            bench = Bench(server.url, "aof", capacity=2000, prompts=500)
            times = bench.insert_times(100 if quick else 600)
            yield f"aof_{name}_insert_per_s", rate(times)
            yield f"aof_{name}_insert_p99_ms", float(np.percentile(times, 99)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("build/bench/buffer.json"))
    options = parser.parse_args()
    figures: dict[str, float] = {"load_before": os.getloadavg()[0], "cores": os.cpu_count() or 0}
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        for part in (against_raw, footprint, aof_modes, growth):
            for name, value in part(Path(folder), options.quick):
                figures[name] = round(float(value), 4)
                print(f"{name:28s} {figures[name]:>14,.3f}", flush=True)
    figures["load_after"] = round(os.getloadavg()[0], 2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    load = (
        f"load {figures['load_before']:.1f} -> {figures['load_after']:.1f} on "
        f"{figures['cores']:.0f} cores"
    )
    print(f"{options.out}; {load}")


if __name__ == "__main__":
    main()
