"""Dynamic sampling on a real Redis: dead groups give way to other prompts, within a bound and
without a hang."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from avatar_rl.actors.groups import is_dead
from avatar_rl.buffer_service.records.requests import RequestLease
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import LoopConfig
from avatar_rl.cluster.training.prompt_schedule import PromptSchedule
from avatar_rl.learner.batch.plan import last_attempts
from tests.buffer_records import make_group

ATTEMPTS, PER_STEP = 3, 4
IDS = [f"p{i:02d}" for i in range(24)]
ALIVE, SOLVED, UNSOLVED = (1.0, 0.0, 1.0, 0.0), (1.0,) * 4, (0.0,) * 4


def answer(buffer: ReplayBuffer, rewards: Callable[[str], tuple[float, ...]]) -> int:
    """What rollout actors do until nothing is asked any more: groups generated."""
    count = 0
    while leases := buffer.requests.lease("actor", 3, max_staleness=0):
        for lease in leases:
            count += 1
            deliver(buffer, lease, rewards(lease.request.prompt_id))
    return count


def deliver(buffer: ReplayBuffer, lease: RequestLease, rewards: tuple[float, ...]) -> None:
    group = make_group(lease, rewards)
    replace = bool(lease.request.spares) and is_dead(group, "accuracy")
    for _ in range(2):  # a reply that was lost: said again, and nothing changes
        buffer.requests.add_group(group, lease, tokens_generated=24, replace=replace)


@pytest.mark.parametrize(
    ("pool", "generated", "alive"),
    [
        (dict.fromkeys(IDS, ALIVE), 4, 4),
        (dict.fromkeys(IDS, SOLVED), 12, 0),
        (dict.fromkeys(IDS, UNSOLVED), 12, 0),
        ({p: ALIVE if i % 2 else SOLVED for i, p in enumerate(IDS)}, None, None),
    ],
)
def test_every_step_is_complete_whatever_the_pool(
    buffer: ReplayBuffer,
    pool: dict[str, tuple[float, ...]],
    generated: int | None,
    alive: int | None,
) -> None:
    loop = LoopConfig.model_validate(
        {"prompts_per_step": PER_STEP, "dynamic_sampling": {"attempts": ATTEMPTS}, "replayed": 0}
    )
    plan = PromptSchedule(IDS, loop, seed=1, warm_up=0)
    token, total = buffer.replay.new_fencing_token(), 0
    for step in range(3):
        buffer.requests.push(plan.requests(step))
        count = answer(buffer, pool.__getitem__)
        total += count
        buffer.requests.push(plan.requests(step))  # a driver that begins again
        assert buffer.requests.lease("actor", 9, max_staleness=0) == []
        share = buffer.replay.lease_fresh("learner", step, fencing_token=token)
        assert share.ready and len(share.groups) == count
        trained, replaced = last_attempts(share.groups, ATTEMPTS)
        assert len(trained) == PER_STEP and all(is_dead(group, "accuracy") for group in replaced)
        assert len({group.prompt_id for group in share.groups}) == count  # never the same twice
        living = sum(not is_dead(group, "accuracy") for group in trained)
        assert generated is None or count == generated
        assert living == alive if alive is not None else living >= 1
        assert buffer.replay.draw(4, step=step, seed=0) == [] or step > 0
        drawn = buffer.replay.draw(4, step=step, seed=0)
        assert not {t.group_id for t in drawn} & {group.id for group in share.groups}
        buffer.replay.commit_step(step, step + 1, [group.id for group in trained], token)
        ledger = buffer.stats.check_ledger()
        assert ledger.generated == total and ledger.completions == 4 * total
        assert ledger.trained_fresh == PER_STEP * (step + 1)
        assert ledger.replay_only == total - ledger.trained_fresh
    assert buffer.stats.read().counters.get("replaced", 0) == total - 3 * PER_STEP


def test_a_spare_whose_prompt_is_set_aside_leaves_the_group_before_it(
    buffer: ReplayBuffer,
) -> None:
    loop = LoopConfig.model_validate(
        {"prompts_per_step": 1, "dynamic_sampling": {"attempts": 2}, "replayed": 0}
    )
    buffer.requests.push(PromptSchedule(IDS, loop, seed=1, warm_up=0).requests(0))
    [first] = buffer.requests.lease("actor", 1, max_staleness=0)
    deliver(buffer, first, SOLVED)
    [spare] = buffer.requests.lease("actor", 1, max_staleness=0)
    assert spare.request.prompt_id == first.request.spares[0]
    assert (spare.request.seq, spare.request.spares) == (first.request.seq + 1, ())
    buffer.requests.quarantine(spare, "DataError")
    share = buffer.replay.lease_fresh("learner", 0)
    assert share.ready and [group.seq for group in share.groups] == [first.request.seq]
    assert last_attempts(share.groups, 2) == (share.groups, [])


def test_a_late_group_is_not_replaced(buffer: ReplayBuffer) -> None:
    loop = LoopConfig.model_validate(
        {"prompts_per_step": 2, "dynamic_sampling": {"attempts": 2}, "replayed": 0}
    )
    buffer.requests.push(PromptSchedule(IDS, loop, seed=1, warm_up=0).requests(0))
    one, two = buffer.requests.lease("actor", 2, max_staleness=0)
    deliver(buffer, one, ALIVE)
    buffer.replay.publish_version(3)
    receipt = buffer.requests.add_group(
        make_group(two, SOLVED), two, tokens_generated=24, bound=1, replace=True
    )
    assert receipt.status == "late"
    assert buffer.requests.lease("actor", 9, max_staleness=0) == []
    assert buffer.replay.lease_fresh("learner", 0).ready
