"""Starting Ray on a machine that is too busy for Ray's own patience."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from avatar_rl.cluster.services.services import NODE_ATTEMPTS, _start_node
from avatar_rl.common.errors import ResourceError

SLOW = "The current node timed out during startup. This could happen because ..."


def fail(monkeypatch: pytest.MonkeyPatch, times: int, text: str) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if len(calls) <= times:
            raise Exception(text)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return calls


def test_a_slow_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail(monkeypatch, NODE_ATTEMPTS - 1, SLOW)
    _start_node(num_cpus=3)
    assert calls == [{"num_cpus": 3}] * NODE_ATTEMPTS


def test_after_some_attempts_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail(monkeypatch, 99, SLOW)
    with pytest.raises(ResourceError, match="too busy, stop other work"):
        _start_node()
    assert len(calls) == NODE_ATTEMPTS


def test_other_failures_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail(monkeypatch, 99, "no such option")
    with pytest.raises(Exception, match="no such option"):
        _start_node()
    assert len(calls) == 1
