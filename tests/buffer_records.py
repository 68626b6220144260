"""Groups, steps and settings for the buffer's tests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest, Tier
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.store import ReplayBuffer

CONFIG = BufferConfig(capacity=100, warm_up=4, reconnect_s=20.0)


def make_group(
    lease: RequestLease,
    rewards: Sequence[float],
    *,
    tokens: int = 6,
    version: int = 0,
    accuracy: bool = True,
) -> Group:
    """The group its lease asks for, with the given rewards; contents depend on the seq only."""
    t = lease.request
    gid = f"{t.seq:08d}"
    rng = np.random.default_rng(t.seq)
    members = tuple(
        Trajectory(
            id=f"{gid}.{i}",
            group_id=gid,
            prompt_id=t.prompt_id,
            index=i,
            hinted=lease.hinted,
            prompt_tokens=5,
            prompt_digest=7,
            token_ids=rng.integers(0, 50_000, tokens, dtype=np.int32),
            logprobs=-rng.random(tokens, dtype=np.float32),
            versions=((version, tokens),),
            finish_reason="stop",
            temperature=1.0,
            reward=reward,
            components={"format": 1.0, "accuracy": reward if accuracy else None},
            step=t.step,
        )
        for i, reward in enumerate(rewards)
    )
    return Group(
        id=gid,
        prompt_id=t.prompt_id,
        seq=t.seq,
        step=t.step,
        hinted=lease.hinted,
        trajectories=members,
    )


def requests(
    step: int, n: int = 2, *, first: int | None = None, prompt: str = "p"
) -> list[RolloutRequest]:
    """``n`` requests of a step, each for a prompt of its own."""
    start = step * n if first is None else first
    return [
        RolloutRequest(seq=start + i, prompt_id=f"{prompt}{start + i}", step=step, n=4)
        for i in range(n)
    ]


def run_step(
    buffer: ReplayBuffer,
    step: int,
    fencing_token: int,
    rewards: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0),
) -> None:
    """A whole step of two groups: pushed, generated, trained and committed."""
    buffer.requests.push(requests(step))
    for lease in buffer.requests.lease("actor", 2, max_staleness=0):
        buffer.requests.add_group(
            make_group(lease, rewards, version=step), lease, tokens_generated=24
        )
    share = buffer.replay.lease_fresh("learner", step, fencing_token=fencing_token)
    assert share.ready
    buffer.replay.commit_step(step, step + 1, [g.id for g in share.groups], fencing_token)


def tier_of(buffer: ReplayBuffer, prompt_id: str) -> Tier | None:
    """Tier of a prompt by the present thresholds; None when it was never scored."""
    client = redis.Redis.from_url(buffer._connection.url)
    rbar = client.zscore(buffer._connection.key("rank"), prompt_id)
    stats = buffer.stats.read()
    if rbar is None:
        return None
    state = msgspec.msgpack.decode(
        client.hget(buffer._connection.key("prompts"), prompt_id)  # type: ignore[arg-type]
    )
    throughout = state[10]  # scripts/parts/prompts.lua
    if throughout is not False:
        return "hard" if throughout == "0" else "easy"
    low, high = stats.threshold_low, stats.threshold_high
    if low is not None and rbar <= low:
        return "hard"
    return "medium" if high is not None and rbar <= high else "easy"


def namespace(buffer: ReplayBuffer) -> dict[bytes, bytes]:
    """Everything on the server, to see whether something changed."""
    client = redis.Redis.from_url(buffer._connection.url)
    return {key: client.dump(key) or b"" for key in client.keys("*")}
