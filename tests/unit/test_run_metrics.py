"""Rates of the rollout actors are those of the last seconds, however short a step is."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from avatar_rl.cluster.training.run_metrics import RunMetrics


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
