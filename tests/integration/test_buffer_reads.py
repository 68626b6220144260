"""A draw chooses and reads, in one round trip or in two: what may happen in between, and while the
values come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import redis

from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.codec import encode
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from tests.buffer_records import CONFIG, make_group, requests, run_step


def stocked(buffer: ReplayBuffer, steps: int = 12) -> int:
    """A buffer with 8 replayable trajectories per step, until a tier is full; returns the token."""
    token = buffer.replay.new_fencing_token()
    for step in range(steps):
        run_step(buffer, step, token)
    return token


def plain(buffer: ReplayBuffer) -> redis.Redis:
    return redis.Redis.from_url(buffer._connection.url)


def after_the_choice(
    buffer: ReplayBuffer, then: Callable[[list[str]], None], *, times: int = 1
) -> list[int]:
    """Calls ``then`` with the chosen ids, ``times`` times, before their values are read. Returns
    the draws' sizes."""
    original, sizes = buffer.replay._run, list[int]()
    buffer._connection._sorts = False  # two round trips: more may happen

    def run(name: str, *args: Any) -> Any:
        reply = original(name, *args)
        if name == "draw":
            sizes.append(len(reply.split()))
            if len(sizes) <= times:
                then(reply.decode().split())
        return reply

    buffer.replay._run = run
    return sizes


def remove(buffer: ReplayBuffer, tids: list[str]) -> None:
    """What an eviction and the end of the linger time do."""
    client, key = plain(buffer), buffer._connection.key
    lists = [name for part in ("stock:", "pt:", "age:") for name in client.keys(key(part + "*"))]
    for tid in tids:
        for name in lists:
            client.zrem(name, tid)
        client.hdel(key("trajs"), tid)
        client.delete(key(f"t:{tid}"))


def test_values_that_vanish_after_the_choice_are_drawn_anew(buffer: ReplayBuffer) -> None:
    stocked(buffer)
    lost: list[str] = []

    def evict(chosen: list[str]) -> None:
        lost.extend(chosen[3:5])
        remove(buffer, chosen[3:5])

    draws = after_the_choice(buffer, evict, times=3)
    drawn = [t.id for t in buffer.replay.draw(16, step=12, seed=5)]
    assert draws == [16] * 4 and len(lost) == 6
    assert len(set(drawn)) == 16 and not set(drawn) & set(lost)
    assert buffer.stats.read().quarantined_records == 0
    assert [t.id for t in buffer.replay.draw(16, step=12, seed=5)] == drawn
    buffer.stats.check_ledger()


def test_an_evicted_value_is_still_read(buffer: ReplayBuffer) -> None:
    token = stocked(buffer)
    gone: set[str] = set()

    def evict(chosen: list[str]) -> None:
        small = CONFIG.model_copy(update={"capacity": 8})
        with ReplayBuffer.connect(small, "run", buffer._connection.url, reconfigure=True) as other:
            run_step(other, 12, token)
        gone.update(
            tid for tid in chosen if not plain(buffer).hexists(buffer._connection.key("trajs"), tid)
        )

    draws = after_the_choice(buffer, evict)
    drawn = [t.id for t in buffer.replay.draw(16, step=12, seed=5)]
    assert draws == [16] and len(drawn) == 16 and gone and gone <= set(drawn)


def test_a_value_deleted_by_hand_is_quarantined_once(buffer: ReplayBuffer) -> None:
    stocked(buffer, 1)
    plain(buffer).delete(buffer._connection.key("t:00000001.2"))
    assert len({t.id for t in buffer.replay.draw(8, step=1, seed=0)}) == 7
    assert buffer.stats.read().quarantined_records == 1
    buffer.replay._quarantined("00000001.2", RecordError("again"))
    buffer.replay._quarantined("99999999.0", RecordError("never stored"))
    assert buffer.stats.read().quarantined_records == 1


def test_a_line_that_breaks_between_two_parts_is_read_anew(
    buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatar_rl.buffer_service.redis.connection._PART", 16)
    buffer._connection._sorts = False
    stocked(buffer)
    expected = [t.id for t in buffer.replay.draw(40, step=12, seed=1)]
    original, parts = Connection.read_values, list[int]()

    def breaking(self: Connection, ids: Any, take: Any) -> None:
        def first_breaks(part: Any, values: Any) -> None:
            parts.append(len(part))
            take(part, values)
            if len(parts) == 2:
                raise redis.exceptions.ConnectionError("broken")

        original(self, ids, first_breaks)

    buffer._connection.read_values = breaking.__get__(buffer._connection)  # type: ignore[method-assign]
    assert [t.id for t in buffer.replay.draw(40, step=12, seed=1)] == expected
    assert sum(parts) > 40 and sum(parts[2:]) == 40


def test_one_round_trip_draws_what_two_do(buffer: ReplayBuffer, server: EmbeddedRedis) -> None:
    stocked(buffer)
    draws = [(40, 1, (0, 1)), (40, 2, (1, 3)), (500, 3, (0, 1)), (5, 4, (0, 1)), (1, 5, (1, 2))]

    def drawn() -> list[list[str]]:
        return [
            [t.id for t in buffer.replay.draw(n, step=12, seed=seed, share=share)]
            for n, seed, share in draws
        ]

    first = drawn()
    assert buffer._connection._sorts and [len(ids) for ids in first] == [40, 13, 500, 5, 0]
    client = redis.Redis.from_url(server.url)
    client.acl_setuser(
        "narrow",
        enabled=True,
        passwords=["+word"],
        keys=["avatar:*"],
        commands=["+@all", "-sort"],
        reset=True,
    )
    buffer._connection._wire.close()
    buffer._connection._wire._pool.connection_kwargs |= {"username": "narrow", "password": "word"}
    assert drawn() == first and not buffer._connection._sorts


def test_an_empty_draw_reads_no_older_list(buffer: ReplayBuffer) -> None:
    stocked(buffer)
    assert len(buffer.replay.draw(8, step=12, seed=1)) == 8
    remove(buffer, [t.id for t in buffer.replay.draw(96, step=12, seed=2)])
    assert buffer.stats.read().stock == 0 and buffer.replay.draw(8, step=12, seed=1) == []


def test_a_list_that_is_over_before_it_is_read_and_a_server_that_forgot_the_script(
    buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(buffer)
    expected = [t.id for t in buffer.replay.draw(40, step=12, seed=1)]
    original = buffer._connection._wire.each

    def expiring(commands: Any, take: Any) -> None:
        replies = list[Any]()
        original(commands, replies.append)
        for number, reply in enumerate(replies):
            take(
                [] if len(commands) == 4 and number > 1 else reply
            )  # the list was over after 16 of 40

    plain(buffer).script_flush()
    assert [t.id for t in buffer.replay.draw(40, step=12, seed=1)] == expected
    monkeypatch.setattr(buffer._connection._wire, "each", expiring)
    assert [t.id for t in buffer.replay.draw(40, step=12, seed=1)] == expected
    assert buffer._connection._sorts


def test_an_interrupt_leaves_no_stale_reply(buffer: ReplayBuffer) -> None:
    stocked(buffer)
    original = buffer._connection.read_values

    def interrupted(part: Any, values: Any) -> None:
        raise KeyboardInterrupt

    ids = [t.id for t in buffer.replay.draw(40, step=12, seed=1)]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            original(ids, interrupted)
        assert [
            t.id for t in buffer.replay.draw(40, step=12, seed=1)
        ] == ids and buffer.stats.read().trained_step == 11


def test_dead_idle_connections_are_replaced(buffer: ReplayBuffer) -> None:
    stocked(buffer, 1)
    barrier = threading.Barrier(6)

    def hold(part: Any, values: Any) -> None:
        barrier.wait(10)  # all six are in use at once

    threads = [
        threading.Thread(target=buffer._connection.read_values, args=(["x"], hold))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain(buffer).client_kill_filter(_type="normal", skipme=True)
    assert buffer.stats.read().stock == 8 and len(buffer.replay.draw(8, step=1, seed=0)) == 8


def test_threads_share_one_buffer(buffer: ReplayBuffer) -> None:
    stocked(buffer)
    buffer.requests.push(requests(12, 60, first=100))
    failures: list[BaseException] = []
    records = {
        t.id: encode(t) for seed in range(30) for t in buffer.replay.draw(40, step=12, seed=seed)
    }

    def work(number: int) -> None:
        try:
            for lease in buffer.requests.lease(f"actor-{number}", 15):
                assert (
                    buffer.requests.add_group(
                        make_group(lease, [0.5]), lease, tokens_generated=6
                    ).status
                    == "fresh"
                )
                for t in buffer.replay.draw(40, step=12, seed=number):
                    assert records.setdefault(t.id, encode(t)) == encode(t)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and buffer.stats.check_ledger().generated == 24 + 60


def test_the_url_does_not_choose_the_protocol(server: EmbeddedRedis) -> None:
    redis.Redis.from_url(server.url).flushall()
    with ReplayBuffer.connect(CONFIG, "other", f"{server.url}?protocol=3") as buffer:
        stocked(buffer, 1)
        assert len(buffer.replay.draw(8, step=1, seed=0)) == 8
