"""Rates of the rollout actors are those of the last seconds, however short a step is."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.architecture import ARCHITECTURES
from avatar_rl.cluster.recipe.gpus import peak_flops
from avatar_rl.cluster.recipe.memory import MemoryPlan
from avatar_rl.cluster.training.run_metrics import RunMetrics
from avatar_rl.cluster.workers.judge_states import JudgeStates
from avatar_rl.learner.objective.step_metrics import ComputedSums


def test_a_step_in_which_no_actor_reported_still_has_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    said = {"tokens": 0.0, "busy_s": 0.0, "wait_s": 0.0}
    control = SimpleNamespace(get_value=lambda name: said)
    fleet = SimpleNamespace(pool=SimpleNamespace(rollouts=["rollout-0"]), working=[1])
    metrics = RunMetrics(
        cast(Any, SimpleNamespace(control=control)),
        cast(Any, fleet),
        cast(Any, None),
        cast(Any, None),
    )
    rates = []
    for step in range(40):  # of half a second; the actor reports every second
        now += 0.5
        if step % 2:
            said = {"tokens": 200.0 * (step + 1), "busy_s": 0.5 * (step + 1), "wait_s": 0.0}
        rates.append(metrics._rollout_metrics(0.5).get("rollout/tokens_per_s"))
    assert rates[-10:] == pytest.approx([400.0] * 10)
    said = {name: value for name, value in said.items()}
    for _ in range(11):  # it stops: after the window nothing is left of it
        now += 0.5
        last = metrics._rollout_metrics(0.5)
    assert last == {}


def test_utilisation_is_of_the_operations_that_were_needed() -> None:
    """Against a count by hand; nothing is said of a CPU, or of a GPU or model of unknown size."""
    omni = next(item for item in ARCHITECTURES if item.name == "Qwen2.5-Omni-7B")
    config = RunConfig.model_validate(
        {"model": {"path": "x"}, "data": {"train": "x"}, "learner": {"ranks": 8}}
    )
    metrics = RunMetrics(
        cast(Any, None), cast(Any, None), cast(Any, None), cast(Any, None), MemoryPlan(config, omni)
    )
    sums = ComputedSums()
    sums.add(6000, (500, 300))  # a prompt and two completions, their last tokens left out
    assert (sums.positions, sums.scored) == (6800, 802)
    assert sums.pairs == 6000 * 6001 // 2 + 500 * 6000 + 125_250 + 300 * 6000 + 45_150
    found = {
        "tokens/computed": float(sums.positions),
        "tokens/scored": float(sums.scored),
        "tokens/pairs": float(sums.pairs),
        "time/forward_backward": 0.9,
        "time/optimizer": 0.1,
    }
    layers = 28 * (3584 * (3584 + 512 + 512 + 3584) + 3 * 3584 * 18944)
    forward = 2 * layers * 6800 + 2 * 3584 * 152064 * 802 + 4 * 28 * 3584 * sums.pairs
    said = metrics._utilisation(found, "NVIDIA H100 80GB HBM3")
    assert said["learner/mfu"] == pytest.approx(3 * forward / (8 * 989e12))
    for device in ("", "Some GPU", "Tesla T4"):
        assert metrics._utilisation(found, device) == {}
    metrics.plan = None
    assert metrics._utilisation(found, "NVIDIA H200") == {}


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    omni = next(item for item in ARCHITECTURES if item.name == "Qwen2.5-Omni-3B")
    whole, frozen = omni.train_flops(1000, 100, 0), omni.train_flops(1000, 100, 0, frozen=True)
    assert frozen / whole == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA RTX A1000", None),
        ("", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_the_judges_state_is_asked_between_steps_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replies: dict[str, Any] = {}

    def wait(refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert timeout == 0 and num_returns == len(refs)
        return [ref for ref in refs if ref in replies], [ref for ref in refs if ref not in replies]

    def get(refs: list[str]) -> list[Any]:
        if any(isinstance(replies[ref], Exception) for ref in refs):
            raise ray.exceptions.RayActorError
        return [replies[ref] for ref in refs]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    names = iter("abcdef")
    stats = SimpleNamespace(remote=lambda: next(names))
    states = JudgeStates([cast(Any, SimpleNamespace(stats=stats))] * 2)
    assert states.metrics() == {}
    replies["a"] = {"judge/breaker_open": 1.0, "judge/unscored": 3.0}
    assert states.metrics() == {}  # b has not answered
    replies["b"] = {"judge/unscored": 2.0}
    assert states.metrics() == {"judge/breaker_open": 1.0, "judge/unscored": 5.0}
    replies |= {"c": RuntimeError(), "d": {}}
    assert states.metrics() == {"judge/breaker_open": 1.0, "judge/unscored": 5.0}
    replies |= {"e": {}, "f": {}}
    names = iter("gh")
    assert states.metrics() == {"judge/breaker_open": 0.0, "judge/unscored": 0.0}
