"""Tiers with ties, and the hint gate, on a real Redis: small pools whose tiers follow by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import redis
import torch
from torch import Tensor

from avatar_rl.buffer_service.config import BufferConfig, HintGateConfig
from avatar_rl.buffer_service.records.requests import PromptKl, RolloutRequest
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.common.errors import ReplayBufferError
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.config import ObjectiveConfig
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.objective.loss import StepTotals, policy_loss
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.prompts.encoding.template import EncodedPrompt
from tests.buffer_records import CONFIG, make_group, tier_of
from tests.tiny_models import build_vision_language

# -- ties and accuracy throughout


def seen(buffer: ReplayBuffer, step: int, scores: dict[str, list[tuple[float, float]]]) -> None:
    """One trained step: for each prompt the (reward, accuracy) of its completions."""
    first = step * 100
    asked = [
        RolloutRequest(seq=first + i, prompt_id=name, step=step, n=len(pairs))
        for i, (name, pairs) in enumerate(scores.items())
    ]
    buffer.requests.push(asked)
    for lease in buffer.requests.lease("a", 99, max_staleness=99):
        pairs = scores[lease.request.prompt_id]
        group = make_group(lease, [reward for reward, _ in pairs], version=step)
        members = tuple(
            msgspec.structs.replace(t, components={"accuracy": accuracy})
            for t, (_, accuracy) in zip(group.trajectories, pairs, strict=True)
        )
        group = msgspec.structs.replace(group, trajectories=members)
        buffer.requests.add_group(group, lease, tokens_generated=1)
    token = buffer.replay.new_fencing_token()
    buffer.replay.commit_step(step, step + 1, [f"{t.seq:08d}" for t in asked], token)


def tiers_of(buffer: ReplayBuffer, names: Iterable[str]) -> dict[str, str | None]:
    """By the helper's own reckoning, which ``ReplayStock.tiers`` must agree with."""
    found = {name: tier_of(buffer, name) for name in names}
    assert buffer.replay.tiers(list(found)) == list(found.values())
    return found


def test_a_tie_takes_the_tier_of_its_mid_rank(buffer: ReplayBuffer) -> None:
    """Of ten prompts two at 0.1 have mid-rank 0.1, five at 0.5 have (2 + 2.5) / 10 = 0.45 and three
    at 0.9 have 0.85. The tie is Medium though q40 falls into it."""
    half = {f"m{i}": [(0.5, 0.5)] * 2 for i in range(5)}
    low, high = (
        {f"h{i}": [(0.1, 0.5)] * 2 for i in range(2)},
        {f"e{i}": [(0.9, 0.5)] * 2 for i in range(3)},
    )
    seen(buffer, 0, low | half | high)
    assert buffer.stats.read().tiers == {"hard": 4, "medium": 10, "easy": 6}
    assert set(tiers_of(buffer, low).values()) == {"hard"}
    assert set(tiers_of(buffer, half).values()) == {"medium"}
    assert set(tiers_of(buffer, high).values()) == {"easy"}
    stats = buffer.stats.read()
    assert (stats.threshold_low, stats.threshold_high) == pytest.approx((0.1, 0.5), abs=4e-9)


def test_a_pool_that_ties_as_a_whole_is_medium(buffer: ReplayBuffer) -> None:
    seen(buffer, 0, {f"p{i}": [(0.5, 0.5)] * 4 for i in range(6)})  # mid-rank 0.5 of each
    stats = buffer.stats.read()
    assert stats.tiers == {"hard": 0, "medium": 24, "easy": 0}
    assert stats.threshold_low is None and stats.threshold_high == 0.5
    assert len(buffer.replay.draw(8, step=1, seed=0)) == 8
    assert buffer.replay.tiers(["p0", "never asked"]) == ["medium", None]
    assert buffer.replay.tiers([]) == []


def test_easy_is_not_empty_at_an_accuracy_of_nine_tenths(buffer: ReplayBuffer) -> None:
    """Nine solved prompts tie at mid-rank 0.55, which would be Medium. What was never solved is
    Hard."""
    solved = {f"s{i}": [(1.0, 1.0)] * 2 for i in range(9)}
    seen(buffer, 0, solved | {"never": [(0.1, 0.0)] * 2})
    assert buffer.stats.read().tiers == {"hard": 2, "medium": 0, "easy": 18}
    assert [t.prompt_id for t in buffer.replay.draw(2, step=1, seed=0, strategy="recent")]
    tiers = [tier_of(buffer, t.prompt_id) for t in buffer.replay.draw(4, step=1, seed=1)]
    assert tiers.count("hard") == 2 and tiers.count("easy") == 2  # one of them for Medium


def test_priority_prefers_what_was_better_than_its_group(buffer: ReplayBuffer) -> None:
    """Groups of one success in four: advantages 1.5 and -0.5, so weights e^2 : 1 : 1 : 1. All are
    Medium, which has one place of four; the rest is filled uniformly."""
    group = [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    seen(buffer, 0, {f"p{i}": group for i in range(4)})
    draws = 400
    best = sum(
        trajectory.reward == 1.0
        for seed in range(draws)
        for trajectory in buffer.replay.draw(4, step=1, seed=seed, strategy="priority")
    )
    expected = (math.exp(2) / (math.exp(2) + 3) + 3 / 4) / 4
    assert best / (4 * draws) == pytest.approx(expected, abs=0.045)  # 3.7 deviations
    again = [buffer.replay.draw(4, step=1, seed=7, strategy="priority") for _ in range(2)]
    assert [t.id for t in again[0]] == [t.id for t in again[1]]
    with pytest.raises(ReplayBufferError, match="priority and magnitude cannot be diverse"):
        buffer.replay.draw(4, step=1, seed=0, strategy="priority", reward_diverse=True)
    with pytest.raises(ValueError, match="reward_diverse off and max_reuse 0"):
        BufferConfig(strategy="priority", max_reuse=2)


def test_magnitude_prefers_large_advantages_and_young_trajectories(server: EmbeddedRedis) -> None:
    """Step 0 and step 4 store the same groups of one success in four: sizes 1.5 and 0.5, so weights
    1.55 : 0.55 : 0.55 : 0.55. With a half-life of 2 versions the older ones weigh a quarter."""
    redis.Redis.from_url(server.url).flushall()
    group = [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    update = {"warm_up": 0, "strategy": "magnitude", "priority_half_life": 2.0}
    with ReplayBuffer.connect(CONFIG.model_copy(update=update), "run", server.url) as b:
        for step in range(5):
            # Nobody learns from what is alike: sizes of 0.05 keep it in the draw.
            alike = {"p": [(1.0, 1.0)] * 2} if step in (1, 2, 3) else {"p": group, "q": group}
            seen(b, step, alike)
        draws, drawn = 400, Counter[tuple[int, float]]()
        for seed in range(draws):
            for one in b.replay.draw(4, step=5, seed=seed):
                drawn[one.version, one.reward or 0.0] += 1
        weights = {
            (version, reward): decay * size
            for version, decay in ((0, 0.25), (4, 1.0))
            for reward, size in ((1.0, 2 * 1.55), (0.0, 6 * 0.55))
        }
        weights |= {(v, 1.0): 2 * 0.05 * 0.5 ** ((4 - v) / 2) for v in (1, 2, 3)}
        total = sum(weights.values())
        for kind, weight in weights.items():
            assert drawn[kind] / (4 * draws) == pytest.approx(weight / total, abs=0.045), kind
    with pytest.raises(ValueError, match="priority_half_life says nothing to strategy uniform"):
        BufferConfig(strategy="uniform", priority_half_life=4.0)
    with pytest.raises(ValueError, match="strategy magnitude draws with replacement"):
        BufferConfig(strategy="magnitude", reward_diverse=True)


def test_an_unsolved_pool_is_hard_whatever_the_rank(buffer: ReplayBuffer) -> None:
    """Accuracy 0 throughout, and other rewards that spread the ranks."""
    seen(buffer, 0, {f"p{i}": [(i / 10, 0.0)] * 2 for i in range(10)})
    assert buffer.stats.read().tiers == {"hard": 20, "medium": 0, "easy": 0}


def test_all_that_is_stored_moves_when_the_window_is_no_longer_all_zero(
    server: EmbeddedRedis,
) -> None:
    redis.Redis.from_url(server.url).flushall()
    config = CONFIG.model_copy(update={"window": 4})
    with ReplayBuffer.connect(config, "run", server.url) as b:
        others = {"x": [(0.2, 0.5)] * 2, "y": [(0.3, 0.5)] * 2}
        seen(b, 0, {"p": [(0.9, 0.0)] * 2} | others)  # the best of rank: never solved
        assert b.stats.read().tiers == {"hard": 4, "medium": 2, "easy": 0}
        seen(b, 1, {"p": [(0.9, 0.0), (0.9, 1.0)]})  # solved once: by rank, so Easy, with all four
        assert b.stats.read().tiers == {"hard": 2, "medium": 2, "easy": 4}
        seen(b, 2, {"p": [(0.9, 1.0)] * 2})
        seen(b, 3, {"p": [(0.1, 1.0)] * 2})  # the window of four is all 1 now: Easy, though last
        assert b.stats.read().tiers == {"hard": 2, "medium": 2, "easy": 8}
        seen(b, 4, {"p": [(0.1, 1.0), (0.1, 0.5)]})  # and by rank again
        assert b.stats.read().tiers == {"hard": 10, "medium": 2, "easy": 2}


def test_unknown_accuracies_pin_no_prompt(buffer: ReplayBuffer) -> None:
    token = buffer.replay.new_fencing_token()
    buffer.requests.push([RolloutRequest(seq=i, prompt_id=f"p{i}", step=0, n=2) for i in range(3)])
    for lease in buffer.requests.lease("a", 9):
        group = make_group(lease, [0.0, 0.0], accuracy=False)
        buffer.requests.add_group(group, lease, tokens_generated=1)
    buffer.replay.commit_step(0, 1, [f"{i:08d}" for i in range(3)], token)
    assert buffer.stats.read().tiers == {"hard": 0, "medium": 6, "easy": 0}


# -- the hint gate


class Gate:
    """A run whose prompt "x" is visited by step, beside "y" and "z", which do better."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer, self.step = buffer, -1
        self.token = buffer.replay.new_fencing_token()

    def visit(
        self,
        rewards: list[float],
        *,
        kl: float | None = None,
        others: tuple[float, float] = (0.8, 0.9),
        accuracies: list[float] | None = None,
        heard: PromptKl | None = None,
    ) -> bool:
        """Whether "x" was hinted. ``kl`` is its mean KL in this step, ``heard`` what a learner
        said of it instead."""
        self.step += 1
        first = 3 * self.step
        self.buffer.requests.push(
            [
                RolloutRequest(seq=first + i, prompt_id=name, step=self.step, n=2)
                for i, name in enumerate("xyz")
            ]
        )
        hinted = {}
        for lease in self.buffer.requests.lease("a", 3):
            name = lease.request.prompt_id
            scores = {"x": rewards, "y": [others[0]] * 2, "z": [others[1]] * 2}[name]
            group = make_group(lease, scores, version=self.step, accuracy=accuracies is not None)
            if accuracies is not None and name == "x":
                members = tuple(
                    msgspec.structs.replace(t, components={"accuracy": value})
                    for t, value in zip(group.trajectories, accuracies, strict=True)
                )
                group = msgspec.structs.replace(group, trajectories=members)
            self.buffer.requests.add_group(group, lease, tokens_generated=1)
            hinted[name] = lease.hinted
        gids = [f"{first + i:08d}" for i in range(3)]
        self.buffer.replay.commit_step(self.step, self.step + 1, gids, self.token)
        found = [PromptKl(prompt_id="y", k3=500.0, tokens=100, fresh=True)]  # an outlier
        if kl is not None:
            found.append(PromptKl(prompt_id="x", k3=100 * kl, tokens=100, fresh=True))
        if heard is not None:
            found.append(heard)
        assert self.buffer.replay.report_behaviour_kl(self.step, found)
        assert not self.buffer.replay.report_behaviour_kl(self.step, found)  # a repeat
        assert not hinted["y"] and not hinted["z"]
        return hinted["x"]


@pytest.fixture
def gate(server: EmbeddedRedis) -> Iterator[Gate]:
    redis.Redis.from_url(server.url).flushall()
    hints = HintGateConfig(hard_patience=3, kl_below=0.01, zero_patience=3)
    config = CONFIG.model_copy(update={"hints": hints, "window": 4})
    with ReplayBuffer.connect(config, "run", server.url) as buffer:
        yield Gate(buffer)


def test_hint_fires_when_stuck_and_is_released(gate: Gate) -> None:
    buffer = gate.buffer
    low = [0.1, 0.1]
    assert [gate.visit(low, kl=0.5) for _ in range(4)] == [False] * 4  # Hard, but still exploring
    assert not gate.visit(low, kl=0.001)  # the mean of its last three visits is 0.334
    assert not gate.visit(low, kl=0.001) and not gate.visit(low, kl=0.001)
    assert gate.visit(low)  # 0.001 at last, whatever the outlier "y" says
    assert gate.visit([1.0, 1.0])  # leaves Hard: released
    assert not gate.visit(low)
    assert buffer.replay.baselines(["x", "x"], [False, True]) == pytest.approx(
        [0.1, (0.1 * 2 + 1.0 * 2) / 4]
    )
    assert buffer.replay.averages(["x", "never asked", "y"]) == pytest.approx(
        {"x": 0.1, "y": 0.8}
    )  # hinted visits aside
    counters = buffer.stats.read().counters
    assert (counters["hints_fired_kl"], counters.get("hints_fired_patience", 0)) == (1, 0)
    assert counters["hints_released"] == 1


def test_replays_of_a_prompt_count_to_its_last_visit(gate: Gate) -> None:
    replay = gate.buffer.replay
    for _ in range(3):
        gate.visit([0.1, 0.1], kl=0.001)
    # 100 tokens at 0.001 and 300 replayed ones at 0.1: 30.1 / 400; the mean of three is 0.0257.
    gate.step += 1
    replay.commit_step(gate.step, gate.step + 1, [], gate.token)
    assert replay.report_behaviour_kl(
        gate.step, [PromptKl(prompt_id="x", k3=30.0, tokens=300, fresh=False)]
    )
    assert not gate.visit([0.1, 0.1], kl=0.001)
    assert not gate.visit([0.1, 0.1], kl=0.001)
    assert not gate.visit([0.1, 0.1], kl=0.001)
    assert gate.visit([0.1, 0.1], kl=0.001)  # that visit has left the mean


def test_zero_accuracy_fires_on_its_own_and_says_so(gate: Gate) -> None:
    for _ in range(3):
        assert not gate.visit([0.1, 0.1], kl=5.0, accuracies=[0.0, 0.0])
    assert gate.visit([0.5, 0.5], kl=5.0, accuracies=[0.0, 0.0])
    # Better by format alone: accuracy 0 throughout is Hard, so the hint stays.
    assert gate.visit([0.85, 0.85], accuracies=[0.0, 0.0])
    assert gate.visit([0.85, 0.95], accuracies=[0.0, 1.0])  # and now it is released
    assert not gate.visit([0.1, 0.1], accuracies=[0.0, 0.0])
    counters = gate.buffer.stats.read().counters
    assert (counters["hints_fired_patience"], counters.get("hints_fired_kl", 0)) == (1, 0)


def test_a_change_of_rank_alone_releases_no_hint(gate: Gate) -> None:
    for _ in range(3):
        gate.visit([0.1, 0.1], kl=0.001)
    assert gate.visit([0.1, 0.1])
    # The others fall below it: "x" is the best of rank and has not moved.
    for _ in range(3):
        assert gate.visit([0.1, 0.1], others=(0.0, 0.05))
    assert tier_of(gate.buffer, "x") == "easy"
    assert gate.visit([0.1, 0.3], others=(0.0, 0.05))  # better than when the hint came on
    assert not gate.visit([0.1, 0.1], others=(0.0, 0.05))
    assert gate.buffer.stats.read().counters["hints_released"] == 1


def test_imputed_rewards_count_for_no_average(buffer: ReplayBuffer) -> None:
    """docs/method.md 1.5: what stands in for a masked mark never enters Rbar."""
    visits = [([0.2, 0.4, 0.9, 0.9], (2, 3)), ([0.9] * 4, (0, 1, 2, 3)), ([0.9, 0.3], (0,))]
    wanted = [0.3, 0.3, 0.3]
    for seq, (rewards, imputed) in enumerate(visits):
        request = RolloutRequest(seq=seq, prompt_id="p", step=seq, n=len(rewards))
        buffer.requests.push([request])
        [lease] = buffer.requests.lease("a", 1, max_staleness=9)
        group = msgspec.structs.replace(make_group(lease, rewards), imputed=imputed)
        buffer.requests.add_group(group, lease, tokens_generated=4)
        assert buffer.replay.averages(["p"]) == {"p": pytest.approx(wanted[seq])}


# -- from a policy to the gate

#: Of a completion.
TOKENS = 150


class Sampled:
    """Completions of a prompt that a policy sampled, and what the learner makes of them later."""

    def __init__(self, folder: Path) -> None:
        self.policy = Policy(load_model(build_vision_language(folder, "qwen3")))
        generator = torch.Generator().manual_seed(0)
        ids = torch.arange(10, 22)
        prompt = EncodedPrompt(ids, torch.arange(len(ids))[None], len(ids))
        drawn = torch.randint(10, 250, (2, TOKENS), generator=generator).numpy().astype(np.int32)
        self.batch = collate([Row(("x", False), prompt, tokens) for tokens in drawn])
        self.behaviour = self.logprobs()

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        return self.policy(self.batch).logprobs

    @torch.no_grad()
    def move(self, by: float) -> None:
        """Every weight by so much, as an update does."""
        generator = torch.Generator().manual_seed(1)
        for parameter in self.policy.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator).sign()

    def heard(self, logprobs: Tensor | None = None) -> PromptKl:
        """What the learner reports of them: its loss, its metrics, its capped KL."""
        now = self.logprobs() if logprobs is None else logprobs
        rows = len(now)
        is_replay = torch.zeros(rows, dtype=torch.bool)
        config = ObjectiveConfig(beta=0)
        lengths = self.batch.mask.sum(1)
        result = policy_loss(
            now,
            self.behaviour,
            self.batch.mask,
            torch.zeros(rows),
            torch.ones_like(self.batch.mask),
            is_replay,
            None,
            config,
            totals=StepTotals.count(lengths, is_replay, config),
        )
        metrics = StepMetrics()
        metrics.add(result, prompt_ids=["x"] * rows)
        [found] = metrics.behaviour_kl()
        assert found.fresh and found.tokens == rows * TOKENS
        return found


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    return Sampled(tmp_path_factory.mktemp("policy") / "model")


def test_a_policy_that_moves_gets_no_hint_and_one_that_stands_still_does(
    gate: Gate, sampled: Sampled
) -> None:
    """From log-probabilities of a model, before and after its weights moved, to the gate."""
    low = [0.1, 0.1]
    still = sampled.heard()
    sampled.move(0.04)
    moved = sampled.heard()
    assert still.k3 / still.tokens < 1e-6 and moved.k3 / moved.tokens > 0.04
    assert [gate.visit(low, heard=moved) for _ in range(5)] == [False] * 5
    sampled.move(-0.04)
    back = sampled.heard()
    assert back.k3 / back.tokens < 1e-6
    assert [gate.visit(low, heard=back) for _ in range(3)] == [
        False
    ] * 3  # of three visits one moved
    assert gate.visit(low)


def test_one_wild_token_of_a_policy_that_stands_still_does_not_hold_the_hint_back(
    gate: Gate, sampled: Sampled
) -> None:
    """Its k3 is e^12 nats. Capped at 1 nat it leaves the mean of 300 tokens at 0.0033."""
    wild = sampled.behaviour.clone()
    wild[0, 7] += 12.0
    heard = sampled.heard(wild)
    assert heard.k3 == pytest.approx(1.0, abs=1e-3)
    assert [gate.visit([0.1, 0.1], heard=heard) for _ in range(3)] == [False] * 3
    assert gate.visit([0.1, 0.1])
