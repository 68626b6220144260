"""What the buffer says about itself: one-round-trip statistics and the ledger."""

from __future__ import annotations

from typing import Any

import msgspec

from avatar_rl.buffer_service.errors import LedgerError
from avatar_rl.buffer_service.records.requests import Ledger, Tier
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.buffer_service.redis.scripting import script
from avatar_rl.buffer_service.replay import FIXED


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the buffer at one moment."""

    version: int
    trained_step: int  # last committed learner step, -1 before the first
    epoch: int
    prompts: int  # prompts with statistics
    mean_rbar: float | None  # mean of Rbar over them
    threshold_low: float | None  # Rbar up to which a prompt is Hard
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
    behaviour_kl: float | None
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

        def ask(pipe: Any) -> None:
            pipe.eval(lua.text, 1, self._connection.prefix)
            pipe.info("memory")

        text, memory = self._connection.together(ask)
        raw: dict[str, Any] = msgspec.json.decode(text)
        counters = {name: int(value) for name, value in (raw["ledger"] or {}).items()}
        return Stats(
            version=raw["version"],
            trained_step=raw["trained"],
            epoch=raw["epoch"],
            prompts=raw["prompts"],
            mean_rbar=int(raw["rbar_sum"]) / FIXED / raw["prompts"] if raw["prompts"] else None,
            threshold_low=None if raw["q_low"] is None else float(raw["q_low"]),
            threshold_high=None if raw["q_high"] is None else float(raw["q_high"]),
            tiers={"hard": raw["hard"], "medium": raw["medium"], "easy": raw["easy"]},
            stock=raw["stock"],
            successes=raw["successes"],
            pending_train=raw["pending_train"],
            pending_eval=raw["pending_eval"],
            leased=raw["leased"],
            fresh=raw["fresh"],
            quarantined_prompts=raw["quarantined_prompts"],
            quarantined_records=raw["quarantined_records"],
            hints_on=raw["hints_on"],
            behaviour_kl=raw["kl"],
            counters=counters,
            ledger=_ledger(counters, raw["fresh"]),
            used_memory=int(memory["used_memory"]),
            max_memory=int(memory["maxmemory"]),
        )

    def tier_counts(self) -> dict[Tier, int]:
        """Replayable trajectories per tier by the present thresholds."""
        return self.read().tiers

    def ledger(self) -> Ledger:
        """The books; ``in_flight`` is counted from the waiting groups, not kept."""
        return self.read().ledger

    def check_ledger(self) -> Ledger:
        """The books, or LedgerError when they do not close."""
        books = self.ledger()
        if books.gap:
            raise LedgerError(
                f"ledger of run {self._connection.run_id}: {books.gap} groups unaccounted for "
                f"({books}); "
                "keep the append-only file and report it"
            )
        return books
