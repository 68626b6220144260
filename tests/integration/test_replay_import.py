"""Replay that a run begins with is older than everything of its own: in averages, in the stock, in
its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from avatar_rl.buffer_service.config import BufferConfig, HintGateConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import LoopConfig
from avatar_rl.cluster.training.prompt_schedule import PromptSchedule
from avatar_rl.cluster.training.replay_import import first_seq, import_replay
from tests.buffer_records import make_group

# A tier of equal averages holds 40 (Hard).
CONFIG = BufferConfig(capacity=100, warm_up=0, window=20, hints=HintGateConfig(enabled=False))
IMPORTED = 3


@pytest.fixture
def loop(server: EmbeddedRedis, tmp_path: Path) -> LoopConfig:
    """A loop of two steps with one prompt each, and a stage before it that got nothing right."""
    redis.Redis.from_url(server.url).flushall()
    before = PromptSchedule(
        ["p0"], LoopConfig(steps=IMPORTED, prompts_per_step=1), seed=0, warm_up=0
    )
    with ReplayBuffer.connect(CONFIG, "before", server.url) as buffer:
        epoch = buffer.replay.new_fencing_token()
        for step in range(IMPORTED):
            own_step(buffer, before, step, epoch, 0.0)
        buffer.export(tmp_path / "stock.jsonl")
    return LoopConfig(steps=2, prompts_per_step=1, replay_from=tmp_path / "stock.jsonl")


@pytest.fixture
def buffer(server: EmbeddedRedis, loop: LoopConfig) -> Iterator[ReplayBuffer]:
    folder: Any = SimpleNamespace(event=lambda *_: None)
    with ReplayBuffer.connect(CONFIG, "after", server.url) as buffer:
        import_replay(buffer, loop, folder)
        yield buffer


def schedule_of(buffer: ReplayBuffer, loop: LoopConfig) -> PromptSchedule:
    return PromptSchedule(["p0"], loop, seed=0, warm_up=0, first_seq=first_seq(buffer))


def own_step(
    buffer: ReplayBuffer, schedule: PromptSchedule, step: int, epoch: int, reward: float
) -> None:
    requests = schedule.requests(step)
    assert buffer.requests.push(requests) == len(requests), f"step {step} would never arrive"
    for lease in buffer.requests.lease("a", len(requests), max_staleness=0):
        buffer.requests.add_group(
            make_group(lease, [reward] * 8, version=step), lease, tokens_generated=1
        )
    groups = buffer.replay.lease_fresh("l", step).groups
    buffer.replay.commit_step(step, step + 1, [group.id for group in groups], epoch)


def test_imported_visits_leave_an_average_before_those_of_the_run(
    buffer: ReplayBuffer, loop: LoopConfig
) -> None:
    assert buffer.replay.baselines(["p0"]) == [0.0]  # until the run has its own
    schedule, epoch = schedule_of(buffer, loop), buffer.replay.new_fencing_token()
    for step in range(2):
        own_step(buffer, schedule, step, epoch, 1.0)
    assert buffer.replay.baselines(["p0"]) == pytest.approx([16 / 20])


def test_imported_trajectories_are_evicted_before_those_of_the_run(
    buffer: ReplayBuffer, loop: LoopConfig
) -> None:
    schedule, epoch = schedule_of(buffer, loop), buffer.replay.new_fencing_token()
    for step in range(2):
        own_step(buffer, schedule, step, epoch, 0.0)
    kept = {t.group_id for t in buffer.replay.draw(40, step=2, seed=0, strategy="uniform")}
    assert buffer.stats.read().stock == 40 and kept == {f"{seq:08d}" for seq in range(5)}
    own_step(buffer, schedule, 2, epoch, 0.0)
    assert {t.group_id for t in buffer.replay.draw(40, step=3, seed=0)} == {
        f"{seq:08d}" for seq in range(1, 6)
    }


def test_a_run_that_goes_on_longer_than_planned_meets_no_imported_number(
    buffer: ReplayBuffer, loop: LoopConfig, tmp_path: Path
) -> None:
    schedule, epoch = schedule_of(buffer, loop), buffer.replay.new_fencing_token()
    for step in range(2):
        own_step(buffer, schedule, step, epoch, 1.0)
    buffer.snapshot(tmp_path / "cut.avsnap")
    buffer.clear()
    with ReplayBuffer.connect(CONFIG, "after", buffer._connection.url) as resumed:
        resumed.restore(tmp_path / "cut.avsnap")
        longer = schedule_of(resumed, loop.model_copy(update={"steps": 6}))
        epoch = resumed.replay.new_fencing_token()
        for step in range(2, 6):
            own_step(resumed, longer, step, epoch, 1.0)
        books = resumed.stats.check_ledger()
        assert (books.trained_fresh, books.replay_only) == (6, IMPORTED)


def test_the_prompts_asked_do_not_depend_on_what_was_imported() -> None:
    ids = [f"p{i}" for i in range(5)]
    plain, behind = (
        PromptSchedule(ids, LoopConfig(prompts_per_step=3), seed=1, warm_up=0) for _ in range(2)
    )
    behind.first_seq = 700
    for step in range(4):
        pairs = zip(plain.requests(step), behind.requests(step), strict=True)
        assert all(
            (a.prompt_id, a.epoch, a.seq + 700) == (b.prompt_id, b.epoch, b.seq) for a, b in pairs
        )
