"""A run whose learner's state is lost goes back to its checkpoint, as often as it gets further than
that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avatar_rl.cluster.checkpoints.checkpoint import Checkpoint
from avatar_rl.cluster.checkpoints.resume import Resumption
from avatar_rl.cluster.training import restarts
from avatar_rl.cluster.training.loop import train
from avatar_rl.cluster.workers.learner_group import StateLostError
from avatar_rl.common.errors import ResourceError

CONFIG: Any = SimpleNamespace(
    name="run",
    output=SimpleNamespace(folder=Path("runs")),
    supervision=SimpleNamespace(restarts=1),
    checkpoint=SimpleNamespace(every=20),
)


def lose_states(monkeypatch: pytest.MonkeyPatch, cuts: list[int]) -> list[int]:
    """Runs that lose their state once for each of ``cuts``, which is what each goes back to; where
    each began."""
    began: list[int] = []
    checkpoints: Iterator[int] = iter(cuts)

    def execute(config: Any, screen: Any, path: Path, resumption: Resumption | None) -> str:
        began.append(resumption.step if resumption is not None else 0)
        if len(began) <= len(cuts):
            raise StateLostError("held by nobody")
        return "finished"

    def prepare(config: Any, wanted: str, on_message: Any) -> Resumption:
        return Resumption(
            Path(wanted), Checkpoint("run-1", next(checkpoints), 0, "model", "data", 0, {}, [])
        )

    monkeypatch.setattr(restarts, "execute", execute)
    monkeypatch.setattr(restarts, "prepare", prepare)
    monkeypatch.setattr(restarts, "compact_heap", lambda: None)
    return began


def test_it_goes_on_as_long_as_it_gets_further(monkeypatch: pytest.MonkeyPatch) -> None:
    began = lose_states(monkeypatch, [20, 60, 80])
    result: Any = restarts.run_to_end(
        CONFIG, SimpleNamespace(event=lambda message: None, run=lambda path: None)
    )  # type: ignore[arg-type]
    assert result == "finished"
    assert began == [0, 20, 60, 80]


def test_it_ends_when_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    began = lose_states(monkeypatch, [20, 20, 20])
    with pytest.raises(ResourceError, match="learner states died 2 times"):
        restarts.run_to_end(
            CONFIG, SimpleNamespace(event=lambda message: None, run=lambda path: None)
        )  # type: ignore[arg-type]
    assert began == [0, 20]


def test_a_run_that_met_its_target_before_it_was_killed_trains_no_further() -> None:
    done: list[str] = []
    run: Any = SimpleNamespace(
        config=SimpleNamespace(
            loop=SimpleNamespace(steps=9, target_accuracy=0.5),
            evaluation=SimpleNamespace(pool=SimpleNamespace(stop_at=None)),
        ),
        first_step=5,
        fleet=SimpleNamespace(work=lambda: None),
        turns=SimpleNamespace(rollouts=lambda look: None, learner=lambda look: None),
        screen=SimpleNamespace(phase=lambda *said: None),
        folder=SimpleNamespace(status=lambda **said: None),
        heldout=SimpleNamespace(
            results=[0.1, 0.6],
            reached=lambda target: target == 0.5,
            evaluate=lambda step, *_: done.append(f"evaluated at {step}"),
        ),
        train_pool=SimpleNamespace(reached=lambda target: target is not None),
        public_sets=SimpleNamespace(prompt_ids=[], evaluate=lambda step, *_: None),
        supervisor=SimpleNamespace(
            signals=SimpleNamespace(orderly=False),
            watch=None,
            look=None,
            checkpoints=SimpleNamespace(wait=lambda: None),
            report=lambda kind, message: done.append(kind),
        ),
    )
    train(run)  # there is no learner to train with
    assert done == ["target was met", "evaluated at 5"]
