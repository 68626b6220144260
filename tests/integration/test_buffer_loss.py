"""Keys that are removed from outside: noticed at once or by the books, and told by name."""

from __future__ import annotations

import pytest
import redis

from avatar_rl.buffer_service.errors import BufferSetupError, LedgerError
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.common.errors import ReplayBufferError
from tests.buffer_records import CONFIG, make_group, requests, run_step

#: Keys whose loss changes a count that each step looks at.
COUNTED = (
    *("ledger", "seen", "trajs", "stock:f", "stock:s", "stock:v", "rank", "prompts"),
    *("fresh", "groups", "tickets", "pend:t", "pend:e", "leased", "hints"),
    *("quarantine", "facts", "reuse", "drawn"),
)
#: Keys that only the look at everything misses.
LISTED = (
    *("pt:p0", "age:f:8", "age:s:8", "t:00000001.2", "t:00000200.0", "steps", "rounds"),
    *("eval:0",),
)


@pytest.fixture
def client(buffer: ReplayBuffer) -> redis.Redis:
    """Of a buffer in which every kind of key holds something."""
    token = buffer.replay.new_fencing_token()
    for step in range(3):
        run_step(buffer, step, token)
    # "p0" at zero until its hint comes on.
    for step in range(3, 6):
        buffer.requests.push([RolloutRequest(seq=step + 100, prompt_id="p0", step=step, n=2)])
        for lease in buffer.requests.lease("a", 1, max_staleness=0):
            buffer.requests.add_group(
                make_group(lease, [0.0, 0.0], version=step), lease, tokens_generated=1
            )
        buffer.replay.draw(2, step=step, seed=1)
        buffer.replay.commit_step(step, step + 1, [f"{step + 100:08d}"], token)
    buffer.requests.push(requests(6, 4, first=200))
    buffer.requests.push([RolloutRequest(seq=300, prompt_id="p0", step=6, n=2)])
    buffer.requests.push(
        [
            RolloutRequest(seq=i, prompt_id="p1", step=0, n=1, kind="eval", round=0, min_version=i)
            for i in (0, 99)
        ]
    )
    [evaluation, *leases] = buffer.requests.lease("a", 4, max_staleness=0)
    buffer.requests.add_eval(evaluation, b"x")
    buffer.requests.add_group(make_group(leases[0], [1.0]), leases[0], tokens_generated=1)
    [hinted] = buffer.requests.lease("b", 9)[-1:]
    assert hinted.hinted
    buffer.requests.release([hinted])
    buffer.control.set_value("a", 1)
    buffer.control.set_value("a", 2)
    buffer.replay.draw(4, step=6, seed=1)
    buffer.requests.quarantine(leases[1], "too_long", "over 5 tokens")
    buffer.stats.checked()
    buffer.stats.check_ledger()
    return redis.Redis.from_url(buffer._connection.url)


@pytest.mark.parametrize("name", COUNTED)
def test_the_loss_of_a_key_is_noticed_at_the_next_step(
    buffer: ReplayBuffer, client: redis.Redis, name: str
) -> None:
    assert client.delete(buffer._connection.key(name)) == 1
    for look in (buffer.stats.checked, buffer.stats.check_ledger):
        with pytest.raises(LedgerError, match=r"run run does not add up: .*(against|unaccounted)"):
            look()


@pytest.mark.parametrize("name", LISTED)
def test_the_loss_of_a_part_is_noticed_by_the_look_at_everything(
    buffer: ReplayBuffer, client: redis.Redis, name: str
) -> None:
    assert client.delete(buffer._connection.key(name)) == 1
    with pytest.raises(LedgerError, match=r"does not add up: .*(against|gone)"):
        buffer.stats.check_ledger()


def test_a_flush_ends_the_run_and_begins_none(buffer: ReplayBuffer, client: redis.Redis) -> None:
    client.flushdb()
    calls = (
        lambda: buffer.stats.checked(),
        lambda: buffer.stats.check_ledger(),
        lambda: buffer.requests.lease("a", 1),
        lambda: buffer.replay.lease_fresh("l", 6),
        lambda: buffer.replay.commit_step(6, 7, [], 1),
        # A process that is replaced.
        lambda: ReplayBuffer.connect(CONFIG, "run", buffer._connection.url, create=False),
    )
    for call in calls:
        with pytest.raises(
            BufferSetupError, match=r"no run under .* Resume from the last checkpoint"
        ):
            call()
    with pytest.raises(ReplayBufferError, match="run run is not set up"):
        buffer.replay.version()
    assert client.keys("*") == []


def test_a_script_that_meets_a_torn_state_says_so(
    buffer: ReplayBuffer, client: redis.Redis
) -> None:
    client.delete(buffer._connection.key("groups"))
    with pytest.raises(LedgerError, match=r"keys that do not fit together .* removed or edited"):
        buffer.replay.commit_step(6, 7, [], 1)
