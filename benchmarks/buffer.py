"""Replay buffer figures: against raw Redis, growth to a million prompts, memory, AOF modes.

``make bench NAME=buffer`` writes build/bench/buffer.json; it takes about two minutes. Every ratio
compares two things timed by turns in the same process. ``ARGS='--only against_raw growth'`` takes
parts alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis
from redis.connection import Encoder, PythonRespSerializer  # type: ignore[attr-defined]

from avatar_rl.buffer_service.config import AppendFsync, BufferConfig
from avatar_rl.buffer_service.records.codec import encode
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.redis.connection import Connection, open_client, open_wire
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.redis.wire import pack
from avatar_rl.buffer_service.store import ReplayBuffer
from benchmarks.harness import Figures, parser

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


HIDDEN = ("redis", "hiredis")


class WholeCommands:
    """Packs a command into one piece, as hiredis does; redis-py alone sends pieces of 6 kB."""

    def __init__(self) -> None:
        self._pack = PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode).pack

    def pack(self, *args: Any) -> list[bytes]:
        return [b"".join(self._pack(*args))]


def plain_client(url: str, timeout_s: float) -> redis.Redis:
    """redis-py without hiredis: the client that the targets were set against, with the buffer's
    timeout, which costs a system call each time. It looks for hiredis when it is imported, so this
    is a second copy of it."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name in HIDDEN}
    ours |= {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("redis.")}
    sys.modules["hiredis"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        plain = importlib.import_module("redis")
    finally:
        for name in [name for name in sys.modules if name.startswith("redis.")]:
            del sys.modules[name]
        sys.modules.update(ours)
    found: redis.Redis = plain.Redis.from_url(
        url,
        command_packer=WholeCommands(),
        socket_read_size=1 << 18,
        socket_timeout=timeout_s,
    )
    return found


class Bench:
    """One run of the buffer with a stream of requests over ``prompts`` prompts."""

    def __init__(self, url: str, name: str, *, capacity: int, prompts: int) -> None:
        self.config = BufferConfig(capacity=capacity, warm_up=0)
        self.url = url
        self.raw: Any = open_client(self.config, url)  # redis-py, with the buffer's options
        self.plain: Any = plain_client(url, self.config.timeout_s)
        self.buffer = ReplayBuffer.connect(self.config, name, url)
        self.connection = Connection(self.config, name, url)
        self.wire = open_wire(self.config, url)
        self.fencing_token = self.buffer.replay.new_fencing_token()
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
        gids = [g.decode() for g in self.raw.zrange(self.connection.key("fresh"), 0, -1)]
        self.buffer.replay.commit_step(self.step, self.step + 1, gids, self.fencing_token)
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
        key = self.connection.key
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

    def raw_insert_times(self, n: int, client: Any) -> Times:
        """A pipelined client of redis-py: SET of the same bytes, encoded beforehand, in one round
        trip."""
        request = RolloutRequest(seq=0, prompt_id="raw", step=0, n=GROUP)
        lease = RequestLease(request=request, attempt=1, consumer="raw", hinted=False)
        groups = [[encode(t) for t in group_for(lease, self.rng).trajectories] for _ in range(n)]
        times = []
        for i in range(n):
            begin = time.perf_counter()
            pipe = client.pipeline(transaction=False)
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

    def raw_draw_times(self, chosen: list[list[str]], client: Any) -> Times:
        """Plain MGET of the values of draws; nothing is decoded."""
        times = []
        for keys in [[self.connection.key(f"t:{tid}") for tid in ids] for ids in chosen]:
            begin = time.perf_counter()
            client.mget(keys)
            times.append(time.perf_counter() - begin)
        return times

    def wire_draw_times(self, chosen: list[list[str]]) -> Times:
        """The values of draws read by the buffer's own wire; nothing is decoded."""
        times = []
        for ids in chosen:
            begin = time.perf_counter()
            self.connection.read_values(ids, _forget)
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
    """Inserts and draws per second, over those of a plain redis-py client."""
    with EmbeddedRedis(folder / "raw", persistent=False) as server:
        bench = Bench(server.url, "ratios", capacity=10_000, prompts=2000)
        bench.fill(2000 if quick else 10_000)
        rounds = 4 if quick else 20
        times = by_turns(
            [
                lambda _: bench.raw_insert_times(50, bench.plain),
                lambda _: bench.raw_insert_times(50, bench.raw),
                lambda _: bench.insert_times(50),
                lambda _: bench.wire_insert_times(50),
            ],
            rounds,
        )
        yield from _ratios("insert", times)
        bench.commit()
        # Each reader has values of its own, chosen long before: they are in no cache by then.
        chosen = [
            [bench.chosen(20, 20 * (rounds * k + i)) for i in range(rounds)] for k in range(3)
        ]
        times = by_turns(
            [
                lambda i: bench.raw_draw_times(chosen[0][i], bench.plain),
                lambda i: bench.raw_draw_times(chosen[1][i], bench.raw),
                lambda i: bench.draw_times(20, 20 * (3 * rounds + i)),
                lambda i: bench.wire_draw_times(chosen[2][i]),
            ],
            rounds,
        )
        yield from _ratios("draw", times)


def _ratios(what: str, times: list[Times]) -> Iterator[tuple[str, float]]:
    """``times``: redis-py, redis-py with hiredis, the buffer, the bare wire."""
    raw, raw_hiredis, ours, wire = times
    yield f"raw_{what}_per_s", rate(raw)
    yield f"raw_{what}_per_s_with_hiredis", rate(raw_hiredis)
    yield f"{what}_per_s", rate(ours)
    yield f"wire_{what}_per_s", rate(wire)
    yield f"{what}_ratio", rate(ours) / rate(raw)
    yield f"{what}_hiredis_ratio", rate(ours) / rate(raw_hiredis)
    yield f"{what}_wire_ratio", rate(ours) / rate(wire)
    yield f"{what}_p99_ms", float(np.percentile(ours, 99)) * 1e3


def growth(folder: Path, quick: bool) -> Iterator[tuple[str, float]]:
    """Time per call at many prompts and trajectories over that at few; the two servers are
    measured by turns."""
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
        inserts = by_turns([lambda _, b=b: b.insert_times(50) for b in (few, many)], rounds)
        few.commit()
        many.commit()
        draws = by_turns([lambda _, b=b: b.draw_times(30) for b in (few, many)], rounds)
        for what, (small, large) in (("insert", inserts), ("draw", draws)):
            yield f"growth_{what}", statistics.median(large) / statistics.median(small)
        yield "stats_ms_million", _timed(many.buffer.stats.read) * 1e3
        yield from snapshot_figures(many, folder)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def take_snapshot(url: str, capacity: int, out: Path, took: Synchronized[float]) -> None:
    with ReplayBuffer.connect(BufferConfig(capacity=capacity, warm_up=0), "many", url) as buffer:
        took.value = _timed(lambda: buffer.snapshot(out))


def snapshot_figures(bench: Bench, folder: Path) -> Iterator[tuple[str, float]]:
    """The longest any other client had to wait while a snapshot was taken, and the same without
    one."""

    def longest(until: Callable[[], bool]) -> float:
        raw, worst = redis.Redis.from_url(bench.url), 0.0
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
        target=take_snapshot, args=(bench.url, bench.config.capacity, out, took)
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


PARTS = (against_raw, footprint, aof_modes, growth)


def main() -> None:
    options = parser(__doc__)
    names = [part.__name__ for part in PARTS]
    options.add_argument("--only", nargs="+", choices=names, default=names, help="parts alone")
    given = options.parse_args()
    figures = Figures("buffer", given.out)
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        for part in PARTS:
            if part.__name__ in given.only:
                for name, value in part(Path(folder), given.smoke):
                    figures.add({name: value})
    figures.write()


if __name__ == "__main__":
    main()
