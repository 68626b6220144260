"""Statistics of the buffer in one round trip, and the ledger."""

from __future__ import annotations

import msgspec
from redis.client import Pipeline

from avatar_rl.buffer_service.errors import LedgerError
from avatar_rl.buffer_service.records.requests import Ledger, Tier
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.buffer_service.redis.scripting import script
from avatar_rl.buffer_service.replay import FIXED

_SHOWN = 500  # characters of what is wrong


class _Counts(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    trained_step: int  # last committed learner step, -1 before the first
    fencing_token: int  # of the newest learner, 0 before the first
    prompts: int  # prompts with statistics
    threshold_low: float | None  # Rbar up to which a prompt is Hard; None: none is by its rank
    threshold_high: float | None  # Rbar up to which a prompt is Medium
    tiers: dict[Tier, int]  # replayable trajectories
    stock: int  # their sum
    successes: int
    pending_train: int
    pending_eval: int
    leased: int
    fresh: int  # groups that wait to be trained
    quarantined_prompts: int
    quarantined_records: int
    hints_on: int
    faults: str  # counts that should agree and do not: keys were removed or edited from outside


class _Reply(_Counts, frozen=True, kw_only=True):
    """What stats.lua answers. Exact numbers come as text."""

    rbar_sum: int
    ledger: dict[str, float]


class Stats(_Counts, frozen=True, kw_only=True):
    """State of the buffer at one moment."""

    mean_rbar: float | None  # mean of Rbar over the prompts
    counters: dict[str, int]  # everything ever counted, dropped:<reason> included
    ledger: Ledger
    used_memory: int  # bytes, whole server
    max_memory: int  # bytes, 0 when unlimited


def _ledger(counters: dict[str, int], in_flight: int) -> Ledger:
    dropped = {k.partition(":")[2]: v for k, v in counters.items() if k.startswith("dropped:")}
    names = (
        "generated",
        "trained_fresh",
        "replay_only",
        "duplicates",
        "completions",
        "tokens",
        "evicted",
    )
    return Ledger(
        dropped=dropped, in_flight=in_flight, **{name: counters.get(name, 0) for name in names}
    )


class BufferStats:
    """What the buffer holds and has done. Changes nothing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def read(self) -> Stats:
        """Tiers, stock, versions, leases, ledger and memory in one round trip. O(log N)."""
        lua = script("stats")

        def ask(pipe: Pipeline) -> None:
            pipe.eval(lua.text, 1, self._connection.prefix)
            pipe.info("memory")

        text, memory = self._connection.together(ask)
        reply = msgspec.json.decode(text, type=_Reply, strict=False)
        counters = {name: int(value) for name, value in reply.ledger.items()}
        return Stats(
            **{name: getattr(reply, name) for name in _Counts.__struct_fields__},
            mean_rbar=reply.rbar_sum / FIXED / reply.prompts if reply.prompts else None,
            counters=counters,
            ledger=_ledger(counters, reply.fresh),
            used_memory=int(memory["used_memory"]),
            max_memory=int(memory["maxmemory"]),
        )

    def ledger(self) -> Ledger:
        """The ledger. ``in_flight`` is counted from the groups that wait."""
        return self.read().ledger

    def checked(self) -> Stats:
        """As ``read``. Raises LedgerError when the ledger does not balance, or when counts that
        grow and shrink together differ. O(log N)."""
        stats = self.read()
        self._check(stats.ledger, stats.faults)
        return stats

    def check_ledger(self) -> Ledger:
        """The ledger, after a look at everything that is stored. O(contents).

        Raises LedgerError when it does not balance, or when keys of the run are gone."""
        books = self.ledger()
        self._check(books, b"; ".join(self._connection.run("check")).decode())
        return books

    def _check(self, books: Ledger, faults: str) -> None:
        wrong = [f"{books.gap} groups unaccounted for ({books})"] if books.gap else []
        wrong += [faults[:_SHOWN]] if faults else []
        if wrong:
            raise LedgerError(
                f"buffer of run {self._connection.run_id} does not add up: {'; '.join(wrong)}. "
                "Were keys removed or edited from outside? Resume from the last checkpoint"
            )
