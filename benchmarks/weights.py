"""What publishing weights costs -> build/bench/weights.json; run with ``make bench NAME=weights``,
5 minutes.

A publishing actor does what the learner's rank 0 does after a step (`WeightSender.publish`, then
the version's commit in Redis); readers do what a rollout actor's pull thread does, then copy the
tensors into a state dict of their own. The floor is the same bytes through a file in /dev/shm,
written by one process, then read by as many processes at once: a file that is written over, whose
pages are there; and beside it a new one, as versions that others still read need.
docs/benchmarks.md says how to read the figures."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.receiver import WeightReceiver, is_finite
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.buffer_service.weights.store import WeightStore
from avatar_rl.common.weight_files import WeightFiles
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from benchmarks.harness import Figures, parser
from benchmarks.twin_side import (
    MEMBER_PHASES,
    RUN_ID,
    SENDER_PHASES,
    TwinReader,
    TwinSource,
)

SIZES = {"400kb": 400 << 10, "10mb": 10 << 20, "100mb": 100 << 20, "1gb": 1 << 30}
READERS = (1, 2, 4)
CHECKED_BYTES = 128 << 20  # beyond any cache
RANK = 8  # of the adapter
TENSORS = 96  # a published checkpoint has some hundreds; the size is split evenly
SHM = Path("/dev/shm/avatar-bench-weights")
DEADLINE_S = 120.0
TWIN_BYTES = 4 << 20  # of a version under kills
NEVER = 1 << 30  # on the board, too
TWIN_SIZES = ("400kb", "10mb", "100mb")
LOST_S = 60.0  # a version that a reader has not by then is lost
# versions until every page of the store that they come by has been touched: two kept, one read, one
# new
WARM_UP = 4
STEP_S = 1.2  # between versions, as steps take; Ray gives freed objects back once a second


class Source:
    """Rank 0: publishes through its ``publisher`` and commits the version."""

    def __init__(self, weight_store: Any, size: int, url: str) -> None:
        torch.set_num_threads(1)
        self.weights = {f"w{i}": torch.rand(size // 4 // TENSORS) for i in range(TENSORS)}
        self.outbox = Outbox(weight_store)
        self.sender = WeightSender(self.weights, self.outbox, dtype="float32")
        self.buffer = ReplayBuffer.connect(BufferConfig(), "bench", url)

    def publish(self, version: int) -> tuple[float, float]:
        """(monotonic start, seconds the learner stands still)."""
        for tensor in self.weights.values():
            tensor[0] = float(version)
        start = time.monotonic()
        self.sender.publish(version, [self.weights])
        self.buffer.replay.publish_version(version)
        return start, time.monotonic() - start

    def write_file(self, anew: bool) -> float:
        """Seconds to write the same bytes over a file in /dev/shm, or into a new one."""
        if anew:
            SHM.unlink(missing_ok=True)
        with open(SHM, "r+b" if SHM.exists() else "w+b", buffering=0) as file:
            start = time.monotonic()
            for tensor in self.weights.values():
                file.write(tensor.numpy().data)
            return time.monotonic() - start


class Reader:
    """A rollout actor's pull thread, and a state dict for its engine."""

    def __init__(self, weight_store: Any, size: int, url: str) -> None:
        torch.set_num_threads(1)
        self.receiver = WeightReceiver(weight_store, 0)
        self.buffer = ReplayBuffer.connect(BufferConfig(), "bench", url)
        self.state = {f"w{i}": torch.zeros(size // 4 // TENSORS) for i in range(TENSORS)}

    def adopt(self, version: int) -> float:
        """Monotonic time at which ``version`` is in the state dict (one clock for all processes of
        a machine)."""
        for found, weights in self.receiver.updates(self.buffer, lambda: True):
            for name, tensor in weights.items():
                self.state[name].copy_(tensor)
            if found >= version:
                break
        assert all(float(tensor[0]) == version for tensor in self.state.values())
        return time.monotonic()

    def read_file(self) -> tuple[float, float]:
        """(start, end) of reading the file into the state dict."""
        with open(SHM, "rb", buffering=0) as file:
            start = time.monotonic()
            for tensor in self.state.values():
                file.readinto(tensor.numpy().data)  # type: ignore[attr-defined]
            return start, time.monotonic()


def measure(name: str, size: int, readers: int, rounds: int, url: str, figures: Figures) -> None:
    """One size and number of readers; published and plain rounds by turns."""
    make = {"num_cpus": 0, "max_concurrency": 2}
    weight_store = ray.remote(WeightStore).options(num_cpus=0).remote()
    source = ray.remote(Source).options(**make).remote(weight_store, size, url)
    actors = [
        ray.remote(Reader).options(**make).remote(weight_store, size, url) for _ in range(readers)
    ]
    version = ray.get(
        source.__ray_call__.remote(lambda self: self.buffer.replay.version()), timeout=DEADLINE_S
    )
    latencies, pauses = [], []
    floors: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(WARM_UP + rounds):
        version += 1
        waiting = [actor.adopt.remote(version) for actor in actors]
        time.sleep(STEP_S)
        start, pause = ray.get(source.publish.remote(version), timeout=DEADLINE_S)
        done = max(ray.get(waiting, timeout=DEADLINE_S))
        if turn >= WARM_UP:
            latencies.append(done - start)
            pauses.append(pause)
        for anew in (False, True):
            written = ray.get(source.write_file.remote(anew), timeout=DEADLINE_S)
            spans = ray.get([actor.read_file.remote() for actor in actors], timeout=DEADLINE_S)
            if turn >= WARM_UP:
                floors[anew].append(
                    written + max(end for _, end in spans) - min(begin for begin, _ in spans)
                )
    for actor in [*actors, source, weight_store]:
        ray.kill(actor)
    SHM.unlink()
    key = f"{name}_{readers}reader"
    latency, floor, new_file = map(statistics.median, (latencies, floors[False], floors[True]))
    ratios = [floor / latency for floor, latency in zip(floors[False], latencies, strict=True)]
    figures.add(
        {
            f"ratio_{key}": floor / latency,
            f"ratio_{key}_low": min(ratios),
            f"ratio_{key}_high": max(ratios),
            f"adopted_ms_{key}": 1000 * latency,
            f"gb_per_s_{key}": size / 1e9 / latency,
            f"floor_ms_{key}": 1000 * floor,
            f"ratio_new_file_{key}": new_file / latency,
            f"new_file_ms_{key}": 1000 * new_file,
            f"learner_pause_ms_{key}": 1000 * statistics.median(pauses),
        }
    )


def measure_check(size: int, rounds: int, figures: Figures) -> None:
    """The check of an update for NaN and infinity against one reading of the same bytes, by
    turns."""
    torch.set_num_threads(1)
    weights = torch.randn(size // 2).to(torch.bfloat16)
    seconds: dict[str, list[float]] = {"check": [], "aminmax": []}
    for turn in range(1 + 2 * rounds):
        for name, read in (("check", is_finite), ("aminmax", torch.aminmax)):
            start = time.perf_counter()
            read(weights)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    check, floor = (min(values) for values in seconds.values())
    figures.add(
        {
            "finite_check_ratio": floor / check,
            "finite_check_gb_per_s": size / 1e9 / check,
        }
    )


class TwinStage:
    """A sender, its members, and what became of them."""

    MEMBERS = 2

    def __init__(self, size: int, url: str, members: int = MEMBERS, board_every: int = 1) -> None:
        self.size, self.url, self.board_every = size, url, board_every
        self.weight_store = ray.remote(WeightStore).options(num_cpus=0).remote()
        self.kills = self.lost = self.mixed = self.adoptions = 0
        self.formations = self.named = 0
        self.source = self._new_source()
        self.readers = [self._new_reader() for _ in range(members)]
        self._until_there()
        self.version = self.committed()  # of the stage before

    def _new_source(self) -> Any:
        self.named += 1
        make = ray.remote(TwinSource).options(num_cpus=0, max_concurrency=3)
        given = (self.weight_store, self.size, self.url, self.named, self.board_every)
        return make.remote(*given)

    def _new_reader(self) -> Any:
        self.named += 1
        make = ray.remote(TwinReader).options(num_cpus=0, max_concurrency=3)
        return make.remote(self.weight_store, self.size, self.url, f"rollout-{self.named}")

    def _until_there(self) -> None:
        """All members show themselves."""
        deadline = time.monotonic() + DEADLINE_S
        while ray.get(self.source.members.remote(), timeout=DEADLINE_S) < len(self.readers):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def committed(self) -> int:
        """The version that was acknowledged last."""
        with ReplayBuffer.connect(BufferConfig(), RUN_ID, self.url) as buffer:
            return buffer.replay.version()

    def publish(self, die_at: str = "") -> dict[str, float] | None:
        """The next version; None where its sender was killed."""
        self.version += 1
        try:
            done: dict[str, float] = ray.get(
                self.source.publish.remote(self.version, die_at), timeout=DEADLINE_S
            )
        except ray.exceptions.RayActorError:
            self.kills += 1
            return None
        self.formations = int(done["formations"])
        return done

    def kill_sender(self, phase: str) -> None:
        """At ``phase`` of a version; another takes over from the committed one, as the learner
        does."""
        if phase in ("calling", "forming", "formed"):  # there has to be a new group
            self.kill_member("idle")
        assert self.publish(phase) is None, f"the sender did not come to {phase!r}"
        self.source = self._new_source()
        self.version = self.committed()
        if self.version:
            again = self.source.publish.remote(self.version)
            ray.get(again, timeout=DEADLINE_S)
        self._judge()

    def kill_member(self, phase: str) -> None:
        """At ``phase`` of a version; another joins."""
        if phase in ("called", "forming", "joined"):
            self._replace(self.readers.pop(), "idle")
        victim = self.readers.pop(0)
        if phase != "idle":
            ray.get(victim.arm.remote(phase), timeout=DEADLINE_S)
            assert self.publish() is not None
            self._replace(victim, phase)
        else:
            self._replace(victim, "idle")
            assert self.publish() is not None
        self._judge()

    def _replace(self, victim: Any, phase: str) -> None:
        try:
            if phase == "idle":
                ray.get(victim.arm.remote("idle"), timeout=DEADLINE_S)
            else:
                ray.get(victim.until.remote(1 << 30, DEADLINE_S), timeout=DEADLINE_S)
            raise AssertionError(f"the member did not come to {phase!r}")
        except ray.exceptions.RayActorError:
            self.kills += 1
        self.readers.append(self._new_reader())

    def _judge(self) -> None:
        """What was committed is with everybody."""
        committed = self.committed()
        found = ray.get(
            [reader.until.remote(committed, LOST_S) for reader in self.readers],
            timeout=DEADLINE_S,
        )
        self.lost += sum(one["version"] < committed for one in found)
        self.count(found)

    def count(self, found: Sequence[Mapping[str, float]]) -> None:
        """Of readers that are there."""
        self.mixed = max(self.mixed, int(sum(one["mixed"] for one in found)))
        self.adoptions += len(found)

    def close(self) -> None:
        for actor in [*self.readers, self.source, self.weight_store]:
            ray.kill(actor)


def measure_kills(url: str, rounds: int, figures: Figures) -> None:
    """The twin under kills of a sender or a member at every phase of a transfer."""
    stage = TwinStage(TWIN_BYTES, url)
    assert stage.publish() is not None
    start, slowest = time.monotonic(), 0.0
    plan = [(stage.kill_sender, phase) for phase in SENDER_PHASES]
    plan += [(stage.kill_member, phase) for phase in MEMBER_PHASES]
    if rounds == 0:  # one of each, of the middle of a transfer
        plan = [(stage.kill_sender, "part 2"), (stage.kill_member, "received")]
    for kill, phase in plan:
        began = time.monotonic()
        kill(phase)
        spent = time.monotonic() - began
        slowest = max(slowest, spent)
        print(f"  {kill.__name__:12s} {phase:10s} {spent:6.1f} s", flush=True)
    stage.close()
    figures.add(
        {
            "twin_kills": stage.kills,
            "twin_lost": stage.lost,
            "twin_mixed": stage.mixed,
            "twin_adoptions": stage.adoptions,
            "twin_recovery_s": slowest,
            "twin_kills_s": time.monotonic() - start,
        }
    )


def measure_twin(
    name: str, size: int, readers: int, rounds: int, url: str, figures: Figures
) -> None:
    """Publication and adoption by the twin, against the board's in the same run: latency until the
    last reader has it, and the learner's pause."""
    stage = TwinStage(size, url, readers, NEVER)
    latencies, pauses = [], []
    for turn in range(WARM_UP + rounds):
        time.sleep(STEP_S / 4)
        done = stage.publish()
        assert done is not None and done["members"] == readers
        found = ray.get(
            [r.until.remote(stage.version, LOST_S) for r in stage.readers], timeout=DEADLINE_S
        )
        if turn >= WARM_UP:
            latencies.append(max(one["at"] for one in found) - done["start"])
            pauses.append(done["pause"])
    stage.close()
    key = f"{name}_{readers}reader"
    latency, pause = statistics.median(latencies), statistics.median(pauses)
    sent = size * 4 / 5  # what never changes was sent before
    values = {
        f"twin_adopted_ms_{key}": 1000 * latency,
        f"twin_gb_per_s_{key}": sent / 1e9 / latency,
        f"twin_pause_ms_{key}": 1000 * pause,
    }
    board = figures.values.get(f"adopted_ms_{key}")
    if board is not None:
        values[f"twin_vs_board_{key}"] = board / (1000 * latency)
    figures.add(values)


def layers(hidden: int, mlp: int) -> dict[str, tuple[int, int]]:
    """The linear layers of one decoder layer."""
    return dict.fromkeys("qkvo", (hidden, hidden)) | {
        "gate": (mlp, hidden),
        "up": (mlp, hidden),
        "down": (hidden, mlp),
    }


class AdapterSource:
    """Rank 0 of a run with LoRA: publishes all weights of a 10 MB decoder, or its adapter of rank
    8."""

    def __init__(self, weight_store: Any, url: str) -> None:
        torch.set_num_threads(1)
        whole: dict[str, torch.Tensor] = {"embed": torch.rand(2048, 192)}
        adapter: dict[str, torch.Tensor] = {}
        for number in range(5):
            for name, (rows, columns) in layers(192, 512).items():
                whole[f"{number}.{name}"] = torch.rand(rows, columns)
                adapter[f"{number}.{name}.A"] = torch.rand(RANK, columns)
                adapter[f"{number}.{name}.B"] = torch.rand(rows, RANK)
        self.weights = {"full": whole, "adapter": adapter}
        self.outbox = Outbox(weight_store)
        self.senders = {
            kind: WeightSender(weights, self.outbox, dtype="float32")
            for kind, weights in self.weights.items()
        }
        self.buffer = ReplayBuffer.connect(BufferConfig(), "bench", url)

    def publish(self, version: int, kind: str) -> float:
        """Seconds the learner stands still."""
        start = time.monotonic()
        self.senders[kind].publish(version, [self.weights[kind]])
        self.buffer.replay.publish_version(version)
        return time.monotonic() - start


def measure_adapter(rounds: int, url: str, figures: Figures) -> None:
    """An adapter as a version against all weights: pause of the learner by turns in one run, and
    bytes on the tiny Omni."""
    weight_store = ray.remote(WeightStore).options(num_cpus=0).remote()
    source = (
        ray.remote(AdapterSource).options(num_cpus=0, max_concurrency=2).remote(weight_store, url)
    )
    version = ray.get(
        source.__ray_call__.remote(lambda self: self.buffer.replay.version()), timeout=DEADLINE_S
    )
    pauses: dict[str, list[float]] = {"full": [], "adapter": []}
    for turn in range(WARM_UP + 4 * rounds):
        for kind, seen in pauses.items():
            version += 1
            time.sleep(STEP_S / 4)
            pause = ray.get(source.publish.remote(version, kind), timeout=DEADLINE_S)
            if turn >= WARM_UP:
                seen.append(pause)
    for actor in (source, weight_store):
        ray.kill(actor)
    full, adapter = (statistics.median(pauses[kind]) for kind in ("full", "adapter"))
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_omni(Path(folder) / "omni")
        headers = WeightFiles.find(Path(folder) / "omni").headers()
        shapes = {name: header.shape for name, header in headers.items()}
    text = [s for n, s in shapes.items() if n.startswith("thinker.model.layers") and len(s) == 2]
    adapted = sum(RANK * sum(shape) for shape in text)
    figures.add(
        {
            "adapter_bytes_share": adapted / sum(math.prod(s) for s in shapes.values()),
            "adapter_pause_ratio": adapter / full,
            "adapter_pause_ms": 1000 * adapter,
            "full_pause_ms": 1000 * full,
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--rounds", type=int, default=5)
    options_of.add_argument("--only", choices=SIZES, help="one size")
    options = options_of.parse_args(arguments)
    readers_of, store_bytes = READERS, 5 << 30
    if options.smoke:
        options.rounds, options.only, readers_of, store_bytes = 1, "400kb", (2,), 128 << 20
    os.environ.setdefault("RAY_worker_niceness", "0")
    figures = Figures("weights", options.out)
    measure_check(CHECKED_BYTES, options.rounds, figures)
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as redis:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=store_bytes,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
        try:
            if options.only in (None, "10mb") or options.smoke:
                measure_adapter(options.rounds, redis.url, figures)
            for name, size in SIZES.items():
                for readers in readers_of if options.only in (None, name) else ():
                    measure(name, size, readers, options.rounds, redis.url, figures)
                    if name in TWIN_SIZES:
                        measure_twin(name, size, readers, options.rounds, redis.url, figures)
            measure_kills(redis.url, 0 if options.smoke else 1, figures)
        finally:
            ray.shutdown()
            SHM.unlink(missing_ok=True)
    figures.write()


if __name__ == "__main__":
    main()
