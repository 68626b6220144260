"""Groups for the buffer's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from buffer_service.tickets import TicketLease
from buffer_service.trajectory import Group, Trajectory


def make_group(
    lease: TicketLease, rewards: Sequence[float], *, tokens: int = 6, version: int = 0, accuracy: bool = True
) -> Group:
    """The group its lease asks for, with the given rewards; contents depend on the seq only."""
    t = lease.ticket
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
    return Group(id=gid, prompt_id=t.prompt_id, seq=t.seq, step=t.step, hinted=lease.hinted, trajectories=members)
