"""Completions without an advantage are left out of an update, and ranks share a step that fits one
pack: the update is the one that all completions on one rank make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.weights.sender import Outbox
from avatar_rl.learner.batch.plan import StepWork
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state import StateReplicator
from avatar_rl.learner.step import StepTrainer
from benchmarks.learner_side import make_spec
from tests.integration.test_learner_rank import Encoder, Numbers, step_work
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import build_vision_language

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_skip_dead"
LR = 1e-2
#: Rewards of the three groups of two; the second group is all alike.
REWARDS = {"alive": ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0)), "dead": ((1.0, 1.0),) * 3}


def rewarded(name: str) -> StepWork:
    work = step_work(0)
    groups = tuple(
        msgspec.structs.replace(
            group,
            trajectories=tuple(
                msgspec.structs.replace(one, reward=reward)
                for one, reward in zip(group.trajectories, rewards, strict=True)
            ),
        )
        for group, rewards in zip(work.groups, REWARDS[name], strict=True)
    )
    return StepWork(work.step, work.version, groups, (), ())


def spec_of(folder: Path, *, skip: bool, **changes: Any) -> LearnerSpec:
    config = LearnerConfig(
        objective=ObjectiveConfig(beta=changes.pop("beta", 0.0), old_logprobs="behaviour"),
        optimizer=OptimizerConfig(lr=LR, dtype="float32"),
        skip_dead=skip,
        **changes,
    )
    hints = BufferConfig().hints.model_copy(update={"enabled": False})
    buffer = BufferConfig().model_copy(update={"hints": hints})
    return make_spec(folder / "text", folder / "text", config, max_tokens=8, buffer=buffer)


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Weights after an update, and what was computed for it on this rank."""
    found = {}
    for name in REWARDS:
        for skip in (False, True):
            spec = spec_of(folder, skip=skip)
            optimizer = spec.learner.optimizer
            policy = Policy(load_model(spec.model, dtype="float32"))
            engine = TrainEngine(policy, optimizer, world_size=ranks, dtype="float32")
            replicator = StateReplicator(engine, rank, cast(Outbox, None), max_bytes=0)
            trainer = StepTrainer(
                spec, rank, ranks, engine, cast(Any, Numbers()), cast(Any, Encoder()), replicator
            )
            metrics = StepMetrics()
            trainer.forward_backward(trainer.plan(rewarded(name)), metrics)
            norm = engine.step(LR)
            found[f"{name}-{skip}"] = {
                "weights": engine.state_dict(),
                "positions": metrics.computed.positions,
                "loss": metrics.policy_loss,
                "norm": norm,
                "metrics": metrics.metrics(),
            }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skip")
    build_vision_language(folder / "text", "qwen3")
    for ranks in (1, 2):
        run_ranks(MODULE, folder, ranks)
    return folder


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_update_is_that_of_all_completions(folder: Path, name: str, ranks: int) -> None:
    whole = rank_results(folder, f"{name}-False", 1)
    kept = rank_results(folder, f"{name}-True", ranks)
    for key, tensor in whole["weights"].items():
        torch.testing.assert_close(kept["weights"][key], tensor, rtol=0, atol=2e-5)  # of 1e-2
    assert kept["norm"] == pytest.approx(whole["norm"], rel=1e-4, abs=1e-9)
    losses = sum(rank_results(folder, f"{name}-True", ranks, rank)["loss"] for rank in range(ranks))
    assert losses == pytest.approx(whole["loss"], abs=1e-6)
    if name == "alive":
        assert whole["norm"] > 1e-3  # something was learnt


def test_the_completions_of_dead_groups_are_not_computed(folder: Path) -> None:
    whole, kept = (rank_results(folder, f"alive-{skip}", 1)["positions"] for skip in (False, True))
    # the prompt of 6 tokens and two completions of 4 and 5, the last token of each not computed
    assert whole - kept == 6 + 3 + 4
    assert rank_results(folder, "dead-True", 1)["positions"] == 0
    assert "entropy" not in rank_results(folder, "dead-True", 1)["metrics"]


def test_both_ranks_have_work_where_all_of_it_fits_one_pack(folder: Path) -> None:
    spent = [rank_results(folder, "alive-False", 2, rank)["positions"] for rank in range(2)]
    assert min(spent) > 0.3 * sum(spent)


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.1}, {"router": "balanced"}, {"skip": False}],
    ids=["reference", "routers", "switched off"],
)
def test_all_are_computed_where_something_else_looks_at_them(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert spec_of(tmp_path, skip=True).only_advantages
    assert not spec_of(tmp_path, **{"skip": True, **changes}).only_advantages
    joint = spec_of(tmp_path, skip=True, updates=2)
    assert joint.only_advantages
    objective = joint.learner.objective.model_copy(update={"replay_advantage": "joint"})
    learner = joint.learner.model_copy(update={"objective": objective})
    assert not replace(joint, learner=learner).only_advantages


if __name__ == "__main__":
    rank_main(work)
