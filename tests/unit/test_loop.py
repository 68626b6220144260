"""The training loop: what is requested when, what ends it, and in which order things happen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from avatar_rl.cluster.config import LoopConfig
from avatar_rl.cluster.training.loop import train
from avatar_rl.cluster.training.prompt_schedule import PromptSchedule
from avatar_rl.cluster.workers.turns import Turns


class Rounds:
    """Evaluation rounds that say what is asked of them; the target is met at ``met_at`` steps."""

    def __init__(self, said: list[str], name: str, met_at: int | None = None) -> None:
        self.said, self.name, self.met_at = said, name, met_at
        self.results: list[Any] = []

    def begin(self, step: int) -> None:
        self.said.append(f"{self.name} begins at {step}")

    def collect(self) -> bool:
        return True

    def evaluate(self, step: int, phase: str, watch: object) -> None:
        self.said.append(f"{self.name} at {step}")
        accuracy = 1.0 if self.met_at is not None and step >= self.met_at else 0.0
        self.results.append(SimpleNamespace(accuracy=accuracy))

    def reached(self, target: float | None) -> bool:
        return target is not None and any(found.accuracy >= target for found in self.results)


def a_run(said: list[str], *, first_step: int = 0, met_at: int | None = None, **loop: Any) -> Any:
    """A training run of six steps whose parts only say what they are asked."""
    settings = LoopConfig.model_validate({"steps": 6, "prompts_per_step": 1, **loop})
    evaluation = SimpleNamespace(
        every=2,
        pool=SimpleNamespace(every=0 if met_at is None else 1, stop_at=0.5),
        benchmarks=SimpleNamespace(every=0),
    )
    output = SimpleNamespace(samples_every=3, samples=4)
    return SimpleNamespace(
        config=SimpleNamespace(loop=settings, evaluation=evaluation, output=output),
        first_step=first_step,
        schedule=PromptSchedule(["a", "b"], settings, seed=0, warm_up=0),
        buffer=SimpleNamespace(
            requests=SimpleNamespace(
                push=lambda requests: said.append(f"request {requests[0].step}")
            )
        ),
        fleet=SimpleNamespace(work=lambda: said.append("work"), autoscale=lambda metrics: None),
        turns=Turns(),
        learner=SimpleNamespace(
            train=lambda step, samples, fleet, look: said.append(f"train {step} ({samples})")
        ),
        heldout=Rounds(said, "heldout"),
        train_pool=Rounds(said, "pool", met_at),
        public_sets=SimpleNamespace(prompt_ids=[], evaluate=lambda *_: None),
        supervisor=SimpleNamespace(
            signals=SimpleNamespace(orderly=False),
            watch=None,
            look=None,
            checkpoint=lambda step, last: said.append(f"checkpoint {step}{' last' * last}"),
            checkpoints=SimpleNamespace(wait=lambda: said.append("written")),
        ),
        metrics=SimpleNamespace(measure=lambda *step: {}, write=lambda *step: None, stats=None),
        tolerance=None,
        learning=SimpleNamespace(end=lambda: said.append("learnt?")),
        folder=SimpleNamespace(event=lambda kind, message: said.append(kind), status=lambda **_: 0),
        screen=SimpleNamespace(phase=lambda name: None),
    )


def test_events_of_a_run_in_order() -> None:
    said: list[str] = []
    run = a_run(said, steps=3, max_staleness=1)
    train(run)
    assert said == [
        *("work", "heldout at 0"),
        *("request 0", "request 1", "train 0 (4)", "checkpoint 1"),
        *("request 2", "train 1 (0)", "heldout begins at 2", "checkpoint 2"),
        *("train 2 (0)", "checkpoint 3", "learnt?", "heldout at 3", "written"),
    ]
    assert run.supervisor.signals.orderly is False


@pytest.mark.parametrize("staleness", [0, 1, 2, 9])
def test_requests_run_ahead_by_the_staleness_and_each_step_is_asked_once(staleness: int) -> None:
    said: list[str] = []
    train(a_run(said, max_staleness=staleness))
    requested = [word for word in said if word.startswith("request")]
    assert requested == [f"request {step}" for step in range(6)]
    for step in range(6):
        before = said[: said.index(f"train {step} ({4 if step % 3 == 0 else 0})")]
        ahead = min(step + staleness, 5)
        assert before[::-1].index(f"request {ahead}") >= 0
        assert f"request {ahead + 1}" not in before


def test_a_resumed_run_requests_from_its_own_step_on() -> None:
    said: list[str] = []
    run = a_run(said, first_step=4, max_staleness=1)
    run.heldout.results.append(SimpleNamespace(accuracy=0.0))
    train(run)
    assert said[:3] == ["work", "request 4", "request 5"]
    assert [word for word in said if "train" in word] == ["train 4 (0)", "train 5 (0)"]
    assert "learnt?" not in said  # what its earlier life learnt is not known here


def test_the_step_that_meets_the_target_is_the_last_and_is_saved() -> None:
    said: list[str] = []
    train(a_run(said, met_at=2))
    assert said[-6:] == [
        "pool at 2",
        "pool accuracy reached",
        "checkpoint 2 last",
        "learnt?",
        "heldout at 2",
        "written",
    ]
