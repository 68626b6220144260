"""The Lua scripts against the plain Python model, over random histories (>= 10,000 operations)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from avatar_rl.buffer_service.config import BY_ADVANTAGE, BufferConfig, HintGateConfig
from avatar_rl.buffer_service.records.requests import PromptKl, RequestLease, RolloutRequest
from avatar_rl.buffer_service.records.trajectory import Group
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.common.errors import ReplayBufferError
from tests.buffer_records import make_group, tier_of
from tests.reference_buffer import ReferenceBuffer

OPERATIONS = 0
HAPPENED: Counter[str] = Counter()  # what the random histories reached
SERVER: EmbeddedRedis | None = None
NO_HINTS = HintGateConfig(enabled=False)
CONFIGS = [
    BufferConfig(capacity=24, warm_up=6, hints=HintGateConfig(hard_patience=2, zero_patience=2)),
    BufferConfig(capacity=12, warm_up=0, window=7, max_reuse=2, reward_diverse=True),
    BufferConfig(
        capacity=40, warm_up=4, max_age_versions=2, strategy="same_prompt", hints=NO_HINTS
    ),
    BufferConfig(
        capacity=1000,
        warm_up=10,
        quantile_low=0.2,
        quantile_high=0.5,
        max_reuse=1,
        strategy="uniform",
    ),
    BufferConfig(
        capacity=30,
        warm_up=4,
        strategy="magnitude",
        priority_half_life=2.0,
        priority_temperature=0.5,
        hints=NO_HINTS,
    ),
]
ENDINGS = ["expire", "expire", "release", "renew", "quarantine", "drop", "reap"]
PROMPTS = st.lists(st.integers(2, 5), min_size=1, max_size=3)
K3 = st.sampled_from([0.0, 0.1, 0.7, 5.0])
BOUND = st.sampled_from([None, 0, 1])
REWARDS = st.lists(
    st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, -1.0, 0.1, 0.7]), min_size=1, max_size=5
)


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global SERVER
    folder: Path = tmp_path_factory.mktemp("model")
    with EmbeddedRedis(folder, persistent=False) as SERVER:
        yield


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ReplayBufferError as error:
        return type(error)


SEQS = 3  # of a request and its spares


class BufferMachine(RuleBasedStateMachine):
    """Every rule does the same to both and compares the answers."""

    @initialize(which=st.integers(0, len(CONFIGS) - 1))
    def begin(self, which: int) -> None:
        assert SERVER is not None
        self.config = CONFIGS[which]
        redis.Redis.from_url(SERVER.url).flushdb()
        self.real = ReplayBuffer.connect(self.config, "model", SERVER.url)
        self.model = ReferenceBuffer(self.config)
        self.fencing_token = self.both(lambda b: b.replay.new_fencing_token())
        self.seq = 0
        self.next_step = 0
        self.leases: list[RequestLease] = []
        self.groups: list[tuple[Group, RequestLease]] = []

    def both(self, call: Callable[[Any], Any]) -> Any:
        global OPERATIONS
        OPERATIONS += 1
        real, model = outcome(lambda: call(self.real)), outcome(lambda: call(self.model))
        assert real == model, f"Redis says {real}, the model {model}"
        return real

    @rule(
        n=st.integers(1, 4),
        prompts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
        ahead=st.integers(0, 1),
    )
    def push(self, n: int, prompts: list[int], ahead: int) -> None:
        step = self.next_step + ahead
        requests = [
            RolloutRequest(
                seq=self.seq + SEQS * i,
                prompt_id=f"p{p}",
                step=step,
                n=4,
                spares=tuple(f"p{(p + k) % 10}" for k in range(1, SEQS) if p % 2),
                min_version=p % 3 if p > 7 else 0,
            )
            for i, p in enumerate(prompts[:n])
        ]
        self.seq += SEQS * n
        self.next_step = step if ahead else self.next_step
        self.both(lambda b: b.requests.push(requests))

    @rule(round=st.integers(0, 2), seq=st.integers(0, 3), version=st.integers(0, 3))
    def push_eval(self, round: int, seq: int, version: int) -> None:
        request = RolloutRequest(
            seq=seq, prompt_id=f"p{seq}", step=0, n=1, kind="eval", round=round, min_version=version
        )
        self.both(lambda b: b.requests.push([request]))

    @rule(
        who=st.sampled_from("ab"),
        count=st.integers(1, 5),
        bound=st.integers(0, 2),
        most=st.integers(0, 9),
    )
    def lease(self, who: str, count: int, bound: int, most: int) -> None:
        self.leases += self.both(
            lambda b: b.requests.lease(who, count, 1000.0, bound, most or None)
        )

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        rewards=REWARDS,
        bound=st.sampled_from([None, 0, 1]),
        accuracy=st.booleans(),
        keep=st.booleans(),
        imputed=st.sets(st.integers(0, 7), max_size=3) | st.just(set(range(8))),
        replace=st.booleans(),
    )
    def add(
        self,
        data: st.DataObject,
        rewards: list[float],
        bound: int | None,
        accuracy: bool,
        keep: bool,
        imputed: set[int],
        replace: bool,
    ) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        if lease.request.kind == "eval":
            self.both(lambda b: b.requests.add_eval(lease, b"x"))
            return
        group = make_group(
            lease, rewards, version=max(0, self.model.current - 1), accuracy=accuracy
        )
        known = tuple(sorted(index for index in imputed if index < len(rewards)))
        group = msgspec.structs.replace(group, imputed=known)
        receipt = self.both(
            lambda b: b.requests.add_group(
                group, lease, tokens_generated=len(rewards) * 6, bound=bound, replace=replace
            )
        )
        HAPPENED[receipt.status] += 1
        self.groups.append((group, lease))
        if not keep:
            self.leases.remove(lease)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        group, lease = data.draw(st.sampled_from(self.groups))
        receipt = self.both(lambda b: b.requests.add_group(group, lease, tokens_generated=1))
        assert receipt.status == "duplicate"

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), how=st.sampled_from(ENDINGS))
    def end_lease(self, data: st.DataObject, how: str) -> None:
        held = [lease for lease in self.leases if lease.request.key in self.model.held]
        lease = data.draw(st.sampled_from(held or self.leases))
        key = lease.request.key
        if how == "expire" and key in self.model.held:
            self.model.held[key].expires = -1
            self.real._connection.client.zadd(
                self.real._connection.key("leased"), {key: 1}, xx=True
            )
        elif how == "release":
            self.both(lambda b: b.requests.release([lease]))
        elif how == "renew":
            self.both(lambda b: b.requests.renew(lease.consumer, [lease], 1000.0))
        elif how == "reap":
            self.both(lambda b: b.requests.lease("nobody", 0))  # expired ones go back
        elif how == "drop":
            self.both(lambda b: b.requests.drop(lease, "unscored"))
        elif lease.request.prompt_id in (
            "p0",
            "p1",
            "p6",
            "p7",
            "p8",
            "p9",
        ):  # the others stay usable
            self.both(lambda b: b.requests.quarantine(lease, "broken", "video"))

    @rule(prompt=st.sampled_from(["p0", "p8", "p9"]))
    def give_up(self, prompt: str) -> None:
        """A prompt breaks while another request asks for it."""
        requests = [
            RolloutRequest(seq=self.seq + i, prompt_id=prompt, step=self.next_step, n=2)
            for i in range(2)
        ]
        self.seq += 2
        self.both(lambda b: b.requests.push(requests))
        leases = self.both(lambda b: b.requests.lease("a", 20, 1000.0, 2))
        mine = [x for x in leases if x.request.prompt_id == prompt and x.request.kind == "train"]
        self.leases += [x for x in leases if x not in mine]
        if mine:
            self.both(lambda b: b.requests.quarantine(mine[0], "broken", "video"))
            self.both(lambda b: b.requests.release(mine[1:]))
        self.leases += self.both(lambda b: b.requests.lease("b", 20, 1000.0, 2))

    @rule(
        take=st.integers(0, 3),
        jump=st.integers(0, 1),
        grow=st.integers(-1, 1),
        stale=st.booleans(),
    )
    def commit(self, take: int, jump: int, grow: int, stale: bool) -> None:
        step = self.model.trained + 1 + jump
        gids = sorted(gid for gid, g in self.model.fresh.items() if g.step <= step)
        gids = gids[: max(0, len(gids) - take)] if take < 3 else ["00009999"]
        fencing_token = self.fencing_token - 1 if stale and take else self.fencing_token
        version = self.model_version + grow
        self.both(lambda b: b.replay.commit_step(step, version, gids, fencing_token))
        self.next_step = max(self.next_step, self.model.trained + 1)

    @rule(prompts=PROMPTS, low=st.booleans(), seed=st.integers(0, 9), data=st.data())
    def whole_step(self, prompts: list[int], low: bool, seed: int, data: st.DataObject) -> None:
        """What a run mostly does, so that histories get far."""
        step = self.model.trained + 1
        requests = [
            RolloutRequest(seq=self.seq + i, prompt_id=f"p{p}", step=step, n=2)
            for i, p in enumerate(prompts)
        ]
        self.seq += len(requests)
        self.both(lambda b: b.requests.push(requests))
        if self.model.current < step:
            self.both(lambda b: b.replay.publish_version(step))
        for lease in self.both(lambda b: b.requests.lease("a", 20, 1000.0, 0)):
            if lease.request.kind == "train":
                rewards = [0.0, 0.0] if low else data.draw(REWARDS)
                group = make_group(lease, rewards, version=step)
                self.insert(group, lease)
            else:
                self.leases.append(lease)
        self.draw(8, seed, None, False)
        gids = sorted(gid for gid, g in self.model.fresh.items() if g.step <= step)
        version = self.model_version
        self.both(lambda b: b.replay.commit_step(step, version, gids, self.fencing_token))
        self.next_step = max(self.next_step, self.model.trained + 1)
        self.report_kl([f"p{p}" for p in prompts], fresh=True, k3=data.draw(K3))

    def report_kl(self, prompts: list[str], fresh: bool, k3: float, again: bool = False) -> None:
        step = self.model.kl_step + (0 if again else 1)
        found = [PromptKl(prompt_id=p, k3=k3, tokens=17, fresh=fresh) for p in prompts]
        self.both(lambda b: b.replay.report_behaviour_kl(step, found))

    def insert(self, group: Group, lease: RequestLease) -> None:
        receipt = self.both(lambda b: b.requests.add_group(group, lease, tokens_generated=9))
        HAPPENED[receipt.status] += 1

    @property
    def model_version(self) -> int:
        return max(self.model.trained + 2, self.model.current)

    @rule(ahead=st.integers(0, 1), rank=st.integers(0, 1), who=st.sampled_from(["L0", "L1"]))
    def fresh(self, ahead: int, rank: int, who: str) -> None:
        def ids(b: Any) -> Any:
            share = b.replay.lease_fresh(
                who, self.model.trained + 1 + ahead, (rank, 2), 1000.0, self.fencing_token
            )
            return (
                share.ready,
                share.missing,
                share.expected,
                [t.id for g in share.groups for t in g.trajectories],
            )

        self.both(ids)

    @rule(
        count=st.integers(1, 12),
        seed=st.integers(0, 3),
        strategy=st.sampled_from(
            [None, "stratified", "same_prompt", "uniform", "recent", "priority", "magnitude"]
        ),
        diverse=st.sampled_from([False, True]),
    )
    def draw(self, count: int, seed: int, strategy: Any, diverse: bool) -> None:
        if strategy in BY_ADVANTAGE and self.model.config.max_reuse:
            strategy = "stratified"
        chosen = strategy or self.model.config.strategy
        diverse = diverse and chosen not in ("recent", *BY_ADVANTAGE)

        def ids(b: Any) -> Any:
            step = self.model.trained + 1
            got = b.replay.draw(
                count,
                step=step,
                seed=seed,
                strategy=strategy,
                reward_diverse=diverse,
                prompt_ids=("p1", "p2", "p"),
            )
            return [t.id for t in got]

        drawn = self.both(ids)
        HAPPENED["drawn"] += len(drawn)
        if chosen not in BY_ADVANTAGE:  # which draw with replacement
            assert len(set(drawn)) == min(len(drawn), len(self.model.stock))

    @rule(
        prompts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
        k3=st.sampled_from([0.05, 0.1, 0.3]),
        fresh=st.booleans(),
        again=st.booleans(),
    )
    def kl(self, prompts: list[int], k3: float, fresh: bool, again: bool) -> None:
        self.report_kl([f"p{p}" for p in prompts], fresh, k3, again)

    @rule()
    def another_learner(self) -> None:
        self.fencing_token = self.both(lambda b: b.replay.new_fencing_token())

    @invariant()
    def same_state(self) -> None:
        if not hasattr(self, "real"):
            return
        stats = self.real.stats.read()
        assert stats.tiers == self.model.tier_counts()
        thresholds = tuple(
            -math.inf if x is None else x for x in (stats.threshold_low, stats.threshold_high)
        )
        assert thresholds == (self.model.thresholds() or (-math.inf, -math.inf))
        assert (stats.version, stats.trained_step) == (self.model.current, self.model.trained)
        assert stats.ledger == self.model.stats.ledger() and stats.ledger.gap == 0
        assert stats.faults == ""
        assert stats.leased == len(self.model.held)
        assert stats.pending_train + stats.pending_eval == len(self.model.queue) - len(
            self.model.held
        )
        if self.model.prompts:
            known = sorted(self.model.prompts)
            pid = known[
                OPERATIONS % len(known)
            ]  # one in turn; the tiers' sizes are compared every time
            assert tier_of(self.real, pid) == self.model.tier_of(pid)
            ids, flags = ["p0", "p1", "nobody"], [False, True, False]
            assert self.real.replay.baselines(ids, flags) == self.model.replay.baselines(ids, flags)

    def teardown(self) -> None:
        if hasattr(self, "real"):
            HAPPENED.update(self.real.stats.read().counters)
            self.real.stats.check_ledger()
            self.real.close()


def test_scripts_equal_the_model_over_10000_operations() -> None:
    profile = settings(
        max_examples=180,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        database=None,
    )
    run_state_machine_as_test(BufferMachine, settings=profile)  # type: ignore[no-untyped-call]
    assert OPERATIONS >= 10_000
    reached = (
        "fresh late drawn trained_fresh replay_only evicted aged_out reused_up replayed "
        "hints_fired_kl hints_fired_patience hints_released"
    )
    for what in (
        *reached.split(),
        "leases_expired",
        "dropped:quarantined_prompt",
        "dropped:broken",
    ):
        assert HAPPENED[what] >= 10, (
            f"{what} happened only {HAPPENED[what]} times: the test proves little about it"
        )
