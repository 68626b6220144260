"""The replay buffer in plain Python: what the Lua scripts must do, written for reading. One
process, no Redis.

Same calls, same draws for the same seed as ``avatar_rl.buffer_service.store.ReplayBuffer``. Time
stands still unless ``advance`` moves it. Everything is recomputed from flat dictionaries; nothing
is fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from avatar_rl.buffer_service.config import DEFAULT_LEASE_S, BufferConfig, Strategy
from avatar_rl.buffer_service.errors import (
    FencedError,
    LeaseHeldError,
    StepTrainedError,
    UnknownRequestError,
    VersionError,
)
from avatar_rl.buffer_service.records.requests import (
    CommitReceipt,
    FreshShare,
    InsertReceipt,
    Ledger,
    PromptKl,
    RequestLease,
    RolloutRequest,
    Tier,
)
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.records.validate import (
    accuracy_marks,
    check_group,
    is_success,
    zero_accuracy,
)
from avatar_rl.buffer_service.replay import seed_state

REPAIR, FIXED = 512, 1 << 28


Visit = tuple[int, list[float], str]  # seq, rewards, marks of accuracy


@dataclass
class PromptState:
    """Statistics and hint gate of one prompt."""

    plain: list[Visit] = field(default_factory=list)  # by seq
    hinted: list[Visit] = field(default_factory=list)
    hard_streak: int = 0
    zero_streak: int = 0
    on: bool = False
    on_since: int = 0
    on_rbar: float | None = None
    kls: list[list[float]] = field(default_factory=list)  # [sum of k3, tokens] of each visit


@dataclass
class Held:
    consumer: str
    attempt: int
    expires: float


def last(visits: list[Visit], window: int, since: int = 0) -> list[tuple[float, str]]:
    """(reward, mark of accuracy) of the last trajectories."""
    return [
        pair
        for seq, rewards, marks in visits
        if seq >= since
        for pair in zip(rewards, marks, strict=True)
    ][-window:]


def mean_of_last(visits: list[Visit], window: int, since: int = 0) -> float | None:
    rewards = [reward for reward, _ in last(visits, window, since)]
    total = 0.0
    for r in rewards:
        total += r
    return math.floor(total / len(rewards) * FIXED + 0.5) / FIXED if rewards else None


def place_of_last(visits: list[Visit], window: int, since: int = 0) -> float | None:
    """Their mean, or beyond all means where the accuracy of each was 0, or of each 1."""
    marks = {mark for _, mark in last(visits, window, since)}
    if marks == {"0"}:
        return -math.inf
    return math.inf if marks == {"1"} else mean_of_last(visits, window, since)


def generator(seed: int, step: int) -> Callable[[int], int]:
    """``below(n)``: uniform integers in [0, n), n < 2^22, by L'Ecuyer's combined generator (CACM
    31, 1988). The same arithmetic as scripts/parts/random.lua: exact in 53-bit floats."""
    m1, m2 = 2147483563, 2147483399
    x, y = seed_state(seed, step)

    def below(n: int) -> int:
        nonlocal x, y
        x, y = (x * 40014) % m1, (y * 40692) % m2
        return int((x - y) % (m1 - 1) * n / (m1 - 1))

    return below


def age(tid: str) -> tuple[int, str]:
    return int(tid[:8]), tid[9:]


class ReferenceBuffer:
    """In-memory stand-in for ReplayBuffer (leases, insert, tiers, draws, commit, hints, ledger)."""

    def __init__(self, config: BufferConfig) -> None:
        self.config = config
        self.requests = self.replay = self.stats = self  # one object answers for all parts
        self.now = 0.0
        self.current, self.trained, self.fencing_token = 0, -1, 0
        self.kl_step = -1
        self.queue: dict[str, RolloutRequest] = {}
        self.attempts: dict[str, int] = {}
        self.held: dict[str, Held] = {}
        self.seen: set[int] = set()
        self.steps: dict[int, int] = {}
        self.rounds: dict[int, int] = {}
        self.evals: dict[int, dict[int, bytes]] = {}
        self.bad_prompts: dict[str, str] = {}
        self.prompts: dict[str, PromptState] = {}
        self.fresh: dict[str, Group] = {}
        self.stock: dict[str, Trajectory] = {}
        self.advantages: dict[str, float] = {}  # of every trajectory that was ever stored
        self.reuse: dict[str, int] = {}
        self.drawn: dict[int, list[str]] = {}  # by seed
        self.drawn_step = -1
        self.shares: dict[tuple[int, int], tuple[str, int, float]] = {}
        self.counters: dict[str, int] = {}

    # -- clock and counters

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def _count(self, name: str, n: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + n

    # -- prompt stream

    def push(self, requests: Sequence[RolloutRequest]) -> int:
        new = 0
        for t in requests:
            known = t.key in self.queue
            if t.kind == "train":
                known = known or t.step <= self.trained or t.seq in self.seen
            else:
                known = known or t.seq in self.evals.get(t.round, {})
            if not known:
                self.queue[t.key] = t
                self.attempts[t.key] = 0
                table, at = (self.rounds, t.round) if t.kind == "eval" else (self.steps, t.step)
                table[at] = table.get(at, 0) + 1
                new += 1
        return new

    def _settle(self, key: str) -> None:
        del self.queue[key], self.attempts[key]
        self.held.pop(key, None)

    def _hint(self, t: RolloutRequest) -> bool:
        gate, state = self.config.hints, self.prompts.get(t.prompt_id)
        if t.kind == "eval" or not gate.enabled or state is None:
            return False
        kls = [k3 / tokens for k3, tokens in state.kls[-gate.hard_patience :]]
        total = 0.0
        for kl in kls:
            total += kl
        stuck = state.hard_streak >= gate.hard_patience and (
            bool(kls) and total / len(kls) < gate.kl_below
        )
        if not state.on and (stuck or state.zero_streak >= gate.zero_patience):
            state.on, state.on_since, state.on_rbar = True, t.seq, self._rbar(t.prompt_id)
            self._count("hints_fired")
            self._count("hints_fired_kl" if stuck else "hints_fired_patience")
        return state.on

    def lease(
        self,
        consumer: str,
        count: int,
        lease_s: float = DEFAULT_LEASE_S,
        max_staleness: int = 1,
        completions: int | None = None,
    ) -> list[RequestLease]:
        budget = completions or 10**9
        full = False
        self._reap()
        waiting = [
            t
            for key, t in self.queue.items()
            if key not in self.held and t.min_version <= self.current
        ]
        first = sorted(
            (t for t in waiting if t.kind == "eval"), key=lambda t: (t.min_version, t.key)
        )
        train = [t for t in waiting if t.kind == "train" and t.step <= self.current + max_staleness]
        # A quarantined prompt's request takes a place among the evaluation requests looked at, not
        # among the train ones.
        queue = [(t, i < count) for i, t in enumerate(first)] + [
            (t, True) for t in sorted(train, key=lambda t: (t.step, t.seq))
        ]
        leases: list[RequestLease] = []
        for t, admitted in queue:
            if full or len(leases) == count or not admitted:
                continue
            if t.prompt_id in self.bad_prompts:
                self._drop(t, "quarantined_prompt")
                continue
            full = t.n > budget
            if full:
                continue
            budget -= t.n
            self.attempts[t.key] += 1
            expires = self.now + lease_s
            self.held[t.key] = Held(consumer, self.attempts[t.key], expires)
            leases.append(
                RequestLease(
                    request=t, attempt=self.attempts[t.key], consumer=consumer, hinted=self._hint(t)
                )
            )
        return leases

    def _holds(self, lease: RequestLease) -> bool:
        held = self.held.get(lease.request.key)
        return held is not None and held.attempt == lease.attempt

    def renew(
        self, consumer: str, leases: Sequence[RequestLease], lease_s: float = DEFAULT_LEASE_S
    ) -> list[RequestLease]:
        mine = [lease for lease in leases if lease.consumer == consumer and self._holds(lease)]
        for lease in mine:
            self.held[lease.request.key].expires = self.now + lease_s
        return mine

    def _give_back(self, key: str) -> None:
        del self.held[key]
        t = self.queue[key]
        if t.kind == "train" and t.step <= self.trained:
            self._settle(key)

    def release(self, leases: Sequence[RequestLease]) -> int:
        mine = [lease for lease in leases if self._holds(lease)]
        for lease in mine:
            self._give_back(lease.request.key)
        return len(mine)

    def _reap(self) -> int:
        gone = [key for key, held in self.held.items() if held.expires <= self.now]
        for key in gone:
            self._give_back(key)
        return len(gone)

    def _drop(self, t: RolloutRequest, reason: str) -> None:
        self._settle(t.key)
        if t.kind == "eval":
            self.rounds[t.round] -= 1
            return
        if t.step > self.trained:
            self.steps[t.step] -= 1
        self.seen.add(t.seq)
        self._count("generated")
        self._count(f"dropped:{reason}")

    def quarantine(self, lease: RequestLease, reason: str, detail: str = "") -> bool:
        t = self.queue.get(lease.request.key)
        if t is None:
            return False
        self.bad_prompts.setdefault(t.prompt_id, f"{reason}: {detail}")
        self._drop(t, reason)
        return True

    def drop(self, lease: RequestLease, reason: str) -> bool:
        t = self.queue.get(lease.request.key)
        if t is None:
            return False
        self._drop(t, reason)
        return True

    def add_eval(self, lease: RequestLease, payload: bytes) -> bool:
        t = self.queue.get(lease.request.key)
        if t is None:
            return False
        self.evals.setdefault(t.round, {})[t.seq] = payload
        self._settle(t.key)
        return True

    # -- statistics and tiers

    def _rbar(self, pid: str) -> float | None:
        state = self.prompts[pid]
        plain = mean_of_last(state.plain, self.config.window)
        return plain if plain is not None else mean_of_last(state.hinted, self.config.window)

    def _ranked(self) -> list[tuple[float, str]]:
        return sorted((r, pid) for pid in self.prompts if (r := self._rbar(pid)) is not None)

    def thresholds(self) -> tuple[float, float] | None:
        """Largest Rbar whose mid-rank is Hard, largest whose mid-rank is Medium."""
        rbars = [rbar for rbar, _ in self._ranked()]
        if not rbars:
            return None

        def at(q: float) -> float:
            def mid_rank(rbar: float) -> float:
                below, equal = sum(r < rbar for r in rbars), rbars.count(rbar)
                return (below + equal / 2) / len(rbars)

            return max((r for r in set(rbars) if mid_rank(r) <= q), default=-math.inf)

        return at(self.config.quantile_low), at(self.config.quantile_high)

    def _place(self, pid: str) -> float | None:
        state, window = self.prompts[pid], self.config.window
        return place_of_last(state.plain or state.hinted, window)

    @staticmethod
    def _tier(q: tuple[float, float], place: float) -> Tier:
        if place <= q[0]:
            return "hard"
        return "medium" if place <= q[1] else "easy"

    def tier_of(self, prompt_id: str) -> Tier | None:
        q = self.thresholds()
        if q is None or prompt_id not in self.prompts:
            return None
        place = self._place(prompt_id)
        return None if place is None else self._tier(q, place)

    def _success(self, t: Trajectory) -> bool:
        return is_success(t, self.config.hints.accuracy_component, self.config.success_at)

    def _members(self, tier: Tier, success: bool) -> list[str]:
        """Stored trajectories of a tier and kind, ordered as the sorted set is: by place, then
        id."""
        q = self.thresholds()
        if q is None:
            return []
        places = {pid: place for pid in self.prompts if (place := self._place(pid)) is not None}
        found = [
            (places[t.prompt_id], tid)
            for tid, t in self.stock.items()
            if self._success(t) == success
        ]
        return [tid for place, tid in sorted(found) if self._tier(q, place) == tier]

    def tier_counts(self) -> dict[Tier, int]:
        tiers: tuple[Tier, ...] = ("hard", "medium", "easy")
        return {tier: sum(len(self._members(tier, s)) for s in (False, True)) for tier in tiers}

    def _remove(self, tid: str) -> None:
        del self.stock[tid]
        self.reuse.pop(tid, None)

    def _evict(self, added: int) -> int:
        easy, medium, hard = self.config.capacities()
        gone = 0
        caps: list[tuple[Tier, int]] = [("hard", hard), ("medium", medium), ("easy", easy)]
        for tier, cap in caps:
            failures, successes = (
                sorted(self._members(tier, success), key=age) for success in (False, True)
            )
            over = min(len(failures) + len(successes) - cap, REPAIR + added)
            for tid in (failures + successes)[: max(over, 0)]:
                self._remove(tid)
                gone += 1
        self._count("evicted", gone)
        return gone

    def _expire_old(self, version: int, added: int = 0) -> None:
        if self.config.max_age_versions:
            old = [(t.version, tid) for tid, t in self.stock.items()]
            for v, tid in sorted(old)[: REPAIR + added]:
                if v < version - self.config.max_age_versions:
                    self._remove(tid)

    # -- insert

    def add_group(
        self,
        group: Group,
        lease: RequestLease,
        *,
        tokens_generated: int,
        bound: int | None = None,
        replace: bool = False,
    ) -> InsertReceipt:
        check_group(group)
        if group.seq in self.seen:
            self._count("duplicates")
            return InsertReceipt("duplicate", 0)
        t = self.queue.get(lease.request.key)
        if t is None and group.step > self.trained:
            raise UnknownRequestError(f"group {group.id} has no request")
        if t is not None and (t.prompt_id, t.step) != (group.prompt_id, group.step):
            raise UnknownRequestError(f"group {group.id} does not match a request")
        late = group.step <= self.trained or (
            bound is not None and group.step + bound < self.current
        )
        self.seen.add(group.seq)
        if t is not None:
            self._settle(t.key)
        state = self.prompts.setdefault(group.prompt_id, PromptState())
        visits = state.hinted if group.hinted else state.plain
        marks = accuracy_marks(group, self.config.hints.accuracy_component)
        counted = [i for i in range(len(group.trajectories)) if i not in group.imputed]
        if not counted and not state.plain and not state.hinted:
            counted = list(range(len(group.trajectories)))  # its stock needs a place
        if counted:
            rewards = [group.trajectories[i].reward for i in counted]
            visits.append((group.seq, rewards, "".join(marks[i] for i in counted)))
        visits.sort(key=lambda v: v[0])
        while sum(len(v) for _, v, _ in visits[1:]) >= self.config.window:
            visits.pop(0)
        self._count("generated")
        self._count("completions", len(group.trajectories))
        self._count("tokens", tokens_generated)
        if not late:
            self.fresh[group.id] = group
            if replace and t is not None and t.spares:
                spare = msgspec.structs.replace(
                    t, seq=t.seq + 1, prompt_id=t.spares[0], spares=t.spares[1:]
                )
                self.push([spare])
                self._count("replaced")
            return InsertReceipt("fresh", 0)
        self._make_replayable(group)
        self._count("replay_only")
        if group.step > self.trained:
            self.steps[group.step] -= 1
        return InsertReceipt("late", self._evict(len(group.trajectories)))

    def _make_replayable(self, group: Group) -> None:
        rewards = np.array([t.reward for t in group.trajectories], dtype=float)
        spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        for t, reward in zip(group.trajectories, rewards, strict=True):
            self.stock[t.id] = t
            self.advantages[t.id] = float((reward - rewards.mean()) / (spread + 1e-4))
        q = self.thresholds()
        state = self.prompts[group.prompt_id]
        assert q is not None
        hard = self.tier_of(group.prompt_id) == "hard"
        if state.on:
            window, since, before = self.config.window, state.on_since, state.on_rbar
            helped = mean_of_last(state.hinted, window, since)
            place = place_of_last(state.hinted, window, since)
            rbar = self._rbar(group.prompt_id)
            assert rbar is not None and before is not None
            better = not hard and rbar > before
            if group.hinted and helped is not None and place is not None:
                better = better or (place > q[0] and helped > before)
            if better:
                state.hard_streak, state.zero_streak, state.on = 0, 0, False
                self._count("hints_released")
        elif not group.hinted:
            state.hard_streak = state.hard_streak + 1 if hard else 0
            zero = zero_accuracy(group, self.config.hints.accuracy_component)
            if zero >= 0:
                state.zero_streak = state.zero_streak + 1 if zero else 0

    # -- learner

    def new_fencing_token(self) -> int:
        self.shares.clear()
        self.drawn.clear()
        self.fencing_token += 1
        return self.fencing_token

    def lease_fresh(
        self,
        consumer: str,
        step: int,
        share: tuple[int, int] = (0, 1),
        lease_s: float = DEFAULT_LEASE_S,
        fencing_token: int | None = None,
    ) -> FreshShare:
        if fencing_token is not None and fencing_token != self.fencing_token:
            raise FencedError(f"fencing token {fencing_token} is no longer valid")
        if step <= self.trained:
            raise StepTrainedError(f"step {step} is trained")
        groups = [g for gid, g in sorted(self.fresh.items()) if g.step == step]
        expected = self.steps.get(step, -1)
        if expected < 0 or len(groups) < expected:
            missing = max(expected - len(groups), 1)
            return FreshShare(groups=[], ready=False, missing=missing, expected=expected)
        holder = self.shares.get(share)
        if holder and holder[0] != consumer and holder[1] == step and holder[2] > self.now:
            raise LeaseHeldError(f"share {share} is held by {holder[0]}")
        self.shares[share] = (consumer, step, self.now + lease_s)
        return FreshShare(
            groups=groups[share[0] :: share[1]], ready=True, missing=0, expected=expected
        )

    def baselines(
        self, prompt_ids: Sequence[str], hinted: Sequence[bool] | None = None
    ) -> list[float]:
        ranked = self._ranked()
        mean = sum(int(r * FIXED) for r, _ in ranked) / FIXED / len(ranked)
        values = []
        for pid, flag in zip(prompt_ids, hinted or [False] * len(prompt_ids), strict=True):
            state = self.prompts.get(pid, PromptState())
            rbar = mean_of_last(state.hinted if flag else state.plain, self.config.window)
            values.append(mean if rbar is None else rbar)
        return values

    def commit_step(
        self, step: int, new_version: int, group_ids: Sequence[str], fencing_token: int
    ) -> CommitReceipt:
        if fencing_token != self.fencing_token:
            raise FencedError(f"fencing token {fencing_token} is no longer valid")
        if step <= self.trained:
            return CommitReceipt(
                committed=False, version=self.current, trained=0, replay_only=0, evicted=0
            )
        if new_version < self.current:
            raise VersionError(f"version {new_version} is older than {self.current}")
        named = set(group_ids)
        if any(gid not in self.fresh or self.fresh[gid].step > step for gid in named):
            raise UnknownRequestError("a group is not waiting to be trained")
        self.trained, self.current = step, new_version
        due = sorted(
            (g for g in self.fresh.values() if g.step <= step), key=lambda g: (g.step, g.seq)
        )
        for group in due:
            self._make_replayable(group)
            del self.fresh[group.id]
        self._count("trained_fresh", len(named))
        self._count("replay_only", len(due) - len(named))
        for tid in {tid for ids in self.drawn.values() for tid in ids}:
            if tid in self.stock:
                self.reuse[tid] = self.reuse.get(tid, 0) + 1
                if self.config.max_reuse and self.reuse[tid] >= self.config.max_reuse:
                    self._remove(tid)
        self.drawn.clear()
        self.shares.clear()
        for key, t in list(self.queue.items()):
            if t.kind == "train" and t.step <= step and key not in self.held:
                self._settle(key)
        self.steps = {s: n for s, n in self.steps.items() if s > step}
        added = sum(len(g.trajectories) for g in due)
        self._expire_old(self.current, added)
        evicted = self._evict(added) if self.prompts else 0
        return CommitReceipt(
            committed=True,
            version=new_version,
            trained=len(named),
            replay_only=len(due) - len(named),
            evicted=evicted,
        )

    def publish_version(self, version: int, fencing_token: int | None = None) -> None:
        if fencing_token is not None and fencing_token != self.fencing_token:
            raise FencedError(f"fencing token {fencing_token} is no longer valid")
        if version < self.current:
            raise VersionError(f"version {version} is older than {self.current}")
        self.current = version

    def version(self) -> int:
        return self.current

    def report_behaviour_kl(self, step: int, found: Sequence[PromptKl]) -> bool:
        if step <= self.kl_step:
            return False
        self.kl_step = step
        for one in found:
            state = self.prompts.get(one.prompt_id)
            if state is None:
                continue
            if one.fresh or not state.kls:
                state.kls.append([one.k3, one.tokens])
            else:
                state.kls[-1][0] += one.k3
                state.kls[-1][1] += one.tokens
        return True

    def ledger(self) -> Ledger:
        c = self.counters
        return Ledger(
            generated=c.get("generated", 0),
            trained_fresh=c.get("trained_fresh", 0),
            replay_only=c.get("replay_only", 0),
            dropped={k.partition(":")[2]: v for k, v in c.items() if k.startswith("dropped:")},
            in_flight=len(self.fresh),
            duplicates=c.get("duplicates", 0),
            completions=c.get("completions", 0),
            tokens=c.get("tokens", 0),
            evicted=c.get("evicted", 0),
        )

    # -- draw

    def draw(
        self,
        count: int,
        *,
        step: int,
        seed: int,
        strategy: Strategy | None = None,
        reward_diverse: bool | None = None,
        prompt_ids: Sequence[str] = (),
        version: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> list[Trajectory]:
        if step <= self.trained:
            raise StepTrainedError(f"step {step} is trained")
        if not count or len(self.stock) < self.config.warm_up:
            return []
        self._expire_old(max(self.current, version))
        if not self.stock:
            return []
        diverse = self.config.reward_diverse if reward_diverse is None else reward_diverse
        ids = _Draw(self, count, step, seed, diverse).run(
            strategy or self.config.strategy, prompt_ids
        )
        return [self.stock[tid] for tid in ids[share[0] :: share[1]]]


class _Draw:
    """One draw; mirrors scripts/draw.lua."""

    def __init__(
        self, buffer: ReferenceBuffer, count: int, step: int, seed: int, diverse: bool
    ) -> None:
        self.b, self.count, self.step, self.seed, self.diverse = buffer, count, step, seed, diverse
        self.below: Callable[[int], int] = generator(seed, step)
        self.out: list[str] = []
        self.taken: set[str] = set()
        if buffer.drawn_step != step:
            buffer.drawn.clear()
            buffer.drawn_step = step

    def pick(self, pool: list[str], n: int) -> int:
        order, got = list(pool), 0
        limited = self.b.config.max_reuse > 0
        elsewhere = {
            t for seed, ids in self.b.drawn.items() if limited and seed != self.seed for t in ids
        }
        for i in range(len(pool)):
            if got >= n:
                break
            j = i + self.below(len(pool) - i)
            order[i], order[j] = order[j], order[i]
            tid = order[i]
            if tid not in self.taken and tid not in elsewhere:
                self.taken.add(tid)
                self.out.append(tid)
                got += 1
        return got

    def mix(self, failures: list[str], successes: list[str], n: int, first: str) -> None:
        if not self.diverse:
            self.pick(failures + successes, n)
            return
        more, less = (n + 1) // 2, n // 2
        got = self.pick(successes, more if first == "s" else less)
        got += self.pick(failures, less if first == "s" else more)
        self.pick(failures + successes, n - got)

    def quotas(self, n: int) -> tuple[int, int, int]:
        shares, block = self.b.config.tier_shares, self.b.config.quota_block

        def of(k: int) -> tuple[int, int, int]:
            easy = math.floor(k * shares.easy + 0.5)
            medium = min(math.floor(k * shares.medium + 0.5), k - easy)
            return easy, medium, k - easy - medium

        whole, rest = of(block), of(n % block)
        return tuple(n // block * a + b for a, b in zip(whole, rest, strict=True))  # type: ignore[return-value]

    def stratified(self, n: int) -> None:
        quotas = self.quotas(n)
        tiers: tuple[tuple[Tier, str], ...] = (("easy", "f"), ("medium", "s"), ("hard", "s"))
        for (tier, first), quota in zip(tiers, quotas, strict=True):
            self.mix(self.b._members(tier, False), self.b._members(tier, True), quota, first)

    def by_advantage(self, names: list[str], n: int, magnitude: bool = False) -> None:
        if not names:
            return
        config = self.b.config
        values = np.array([self.b.advantages[tid] for tid in names])
        weights = np.exp((values - values.max()) / config.priority_temperature)
        if magnitude:
            weights = np.abs(values) + 0.05
        if config.priority_half_life:
            versions = np.array([self.b.stock[tid].version for tid in names])
            weights = weights * 0.5 ** ((versions.max() - versions) / config.priority_half_life)
        sums = np.cumsum(weights)
        for _ in range(min(n, len(names))):
            at = (self.below(1 << 20) * (1 << 20) + self.below(1 << 20)) / (1 << 40) * sums[-1]
            self.out.append(names[int(np.searchsorted(sums, at, side="right"))])

    def everything(self, success: bool) -> list[str]:
        tiers: tuple[Tier, ...] = ("hard", "medium", "easy")
        return [tid for tier in tiers for tid in self.b._members(tier, success)]

    def run(self, strategy: Strategy, prompt_ids: Sequence[str]) -> list[str]:
        if strategy == "recent":
            newest = sorted(((t.version, tid) for tid, t in self.b.stock.items()), reverse=True)
            self.out = [tid for _, tid in newest[: self.count]]
        elif strategy == "uniform":
            self.mix(self.everything(False), self.everything(True), self.count, "s")
        elif strategy == "magnitude":
            self.by_advantage(self.everything(False) + self.everything(True), self.count, True)
        elif strategy == "priority":
            tiers: tuple[Tier, ...] = ("easy", "medium", "hard")
            for tier, quota in zip(tiers, self.quotas(self.count), strict=True):
                self.by_advantage(self.b._members(tier, False) + self.b._members(tier, True), quota)
            if len(self.out) < self.count:
                self.pick(
                    self.everything(False) + self.everything(True), self.count - len(self.out)
                )
        else:
            if strategy == "same_prompt":
                for i, pid in enumerate(prompt_ids):
                    mine = sorted(tid for tid, t in self.b.stock.items() if t.prompt_id == pid)
                    n = self.count // len(prompt_ids) + (
                        1 if i < self.count % len(prompt_ids) else 0
                    )
                    good = [tid for tid in mine if self.b._success(self.b.stock[tid])]
                    self.mix([tid for tid in mine if tid not in good], good, n, "s")
            if len(self.out) < self.count:
                self.stratified(self.count - len(self.out))
            if len(self.out) < self.count:
                self.pick(
                    self.everything(False) + self.everything(True), self.count - len(self.out)
                )
        unique = len(self.out)
        if self.b.config.max_reuse == 0 and unique:
            while len(self.out) < self.count:
                self.out.append(self.out[self.below(unique)])
        for i in range(len(self.out) - 1, 0, -1):
            j = self.below(i + 1)
            self.out[i], self.out[j] = self.out[j], self.out[i]
        if self.out:
            self.b.drawn[self.seed] = self.out
        return self.out
