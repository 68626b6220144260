"""Reference log-probabilities over ranks: a replay that another rank scored is not scored again,
no rank holds the whole reference, and a resumed learner remembers.

The buffer is replaced by a list of steps; the ranks are the real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch

import avatar_rl.learner.engine
from avatar_rl.buffer_service.records.requests import PromptKl
from avatar_rl.buffer_service.weights.sender import Outbox
from avatar_rl.learner.batch.microbatch import Row
from avatar_rl.learner.batch.plan import StepWork
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.model.reference import ReferenceCache
from avatar_rl.learner.publication import Publication
from avatar_rl.learner.rank import LearnerRank
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state import REFERENCE
from avatar_rl.learner.state_replica import TAG
from avatar_rl.learner.turn import RankTurn
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.template import PromptEncoder
from benchmarks.learner_side import make_spec
from tests.integration.test_learner_rank import Encoder, Numbers, step_work
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import build_vision_language, respawn

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_reference_shared"
STAGES = (0, 2, 3)


def works() -> list[StepWork]:
    """A step of fresh completions; one that replays all of them beside others; the same again."""
    first, second, third = (step_work(step) for step in (0, 1, 2))
    # Behind the fresh ones and in another order: packs fall to ranks by their sizes.
    old = tuple(t for group in reversed(first.groups) for t in reversed(group.trajectories))
    again = replace(second, replays=old, baselines=(0.5,) * len(old))
    return [first, again, replace(third, replays=old, baselines=(0.5,) * len(old))]


class Steps:
    """Rank 0's buffer."""

    def collect(self, step: int, waiting: Callable[[], None]) -> StepWork:
        return works()[step]

    def commit(self, work: StepWork) -> None: ...

    def report_behaviour_kl(self, step: int, found: Sequence[PromptKl]) -> None: ...


class Rank(LearnerRank):
    """Needs no dataset, tokenizer, weight store or buffer."""

    def __init__(self, spec: LearnerSpec, rank: int, ranks: int) -> None:
        self.spec, self.rank, self.ranks = spec, rank, ranks
        self.prompts = cast("PromptIndex", Numbers())
        self.encoder = cast("PromptEncoder", Encoder())
        self.outbox = cast("Outbox", None)
        self.cold_start = self.state_replica = None
        self.turn = RankTurn(None)


def make_rank(folder: Path, rank: int, ranks: int, stage: int, *, cached: int = 100) -> Rank:
    config = LearnerConfig(
        objective=ObjectiveConfig(beta=0.5),
        optimizer=OptimizerConfig(lr=1e-2, dtype="float32", zero_stage=stage, eps=1e-3),
        micro_batch_tokens=16,
        reference_cache=cached,
        warmup=0,
    )
    spec = make_spec(folder / "text", folder / "other", config, steps=3, replayed=2, max_tokens=8)
    made = Rank(spec, rank, ranks)
    with (
        mock.patch("avatar_rl.learner.rank.StepSource", lambda *_: Steps()),
        mock.patch("avatar_rl.learner.rank.ReplayBuffer"),
    ):
        made.setup("127.0.0.1", 1)  # the group has met already
    assert made.trainer is not None
    made.trainer.publication = mock.create_autospec(Publication, instance=True)
    made.trainer.publication.metrics.return_value = {}
    return made


def train(made: Rank, steps: Sequence[int]) -> dict[str, Any]:
    """Losses of ``steps``, trajectories that this rank trained and those that it scored, by
    step."""
    trainer = made.trainer
    assert trainer is not None and trainer.reference is not None
    cache = trainer.reference.cache
    trained: list[list[str]] = []
    scored: list[list[str]] = []
    note, plain = cache.note, trainer.loss

    def noted(key: tuple[str, int, int], values: Any) -> None:
        scored[-1].append(key[0])
        note(key, values)

    def loss(plan: Any, indices: list[int], rows: list[Row], *rest: Any) -> Any:
        trained[-1] += [plan.trajectories[i].id for i in indices]
        return plain(plan, indices, rows, *rest)

    metrics = []
    with (
        mock.patch.object(cache, "note", noted),
        mock.patch.object(trainer, "loss", loss),
    ):
        for step in steps:
            trained.append([])
            scored.append([])
            report = made.train_step(step)
            metrics.append(None if report is None else report["metrics"])
    found: dict[str, Any] = {"metrics": metrics, "trained": trained, "scored": scored}
    policy = getattr(trainer.reference, "policy", None)
    if policy is not None:
        shares = [getattr(p, "ds_tensor", p).numel() for p in policy.parameters()]
        found["share"] = sum(shares) / sum(
            getattr(p, "ds_numel", p.numel()) for p in policy.parameters()
        )
    return found


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    avatar_rl.learner.engine.WHOLE_BELOW = 0
    found: dict[str, Any] = {}
    for stage in STAGES if ranks > 1 else (0,):
        made = make_rank(folder, rank, ranks, stage)
        found[f"stage{stage}"] = train(made, range(3))
        found[f"weights{stage}"] = made.engine.state_dict()
        found[f"nothing{stage}"] = train(make_rank(folder, rank, ranks, stage, cached=0), range(3))
    # Resumed after the first step, by ranks that know nothing.
    first, other = make_rank(folder, rank, ranks, 0), make_rank(folder, rank, ranks, 0)
    train(first, [0])
    first.replicator.capture()
    first.replicator.write(folder / f"learner-{ranks}")
    if ranks > 1:
        torch.distributed.barrier()
    other.replicator.restore(folder / f"learner-{ranks}")
    found["resumed"] = train(other, [1, 2])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    build_vision_language(folder / "text", "qwen3")
    respawn(folder / "text", folder / "other", seed=7)
    for ranks in (1, 2):
        run_ranks(MODULE, folder, ranks)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_replay_that_the_other_rank_scored_is_not_scored_again(folder: Path, stage: int) -> None:
    alone = rank_results(folder, "stage0", 1)
    ranks = [rank_results(folder, f"stage{stage}", 2, rank) for rank in range(2)]
    old = {t.id for t in works()[1].replays}
    moved = [
        name
        for mine, other in (ranks, ranks[::-1])
        for name in old & set(mine["trained"][1])
        if name in other["trained"][0]
    ]
    assert moved  # else the test shows nothing
    assert not old & {name for one in ranks for step in (1, 2) for name in one["scored"][step]}
    for step in range(3):
        assert sorted(n for one in ranks for n in one["trained"][step]) == sorted(
            alone["trained"][step]
        )
        ours, expected = ranks[0]["metrics"][step], alone["metrics"][step]
        assert expected["loss/kl"] > 0.01
        for name in ("loss/kl", "loss/total", "grad_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    weights = rank_results(folder, f"weights{stage}", 2)
    for name, value in rank_results(folder, "weights0", 1).items():
        assert (weights[name] - value).abs().max() <= 1e-5, name


@pytest.mark.parametrize("stage", STAGES)
def test_without_room_everything_is_scored_and_the_losses_are_the_same(
    folder: Path, stage: int
) -> None:
    kept = rank_results(folder, f"stage{stage}", 2)["metrics"]
    without = [rank_results(folder, f"nothing{stage}", 2, rank) for rank in range(2)]
    old = {t.id for t in works()[1].replays}
    for step in (1, 2):
        assert old <= {name for one in without for name in one["scored"][step]}
    for one, other in zip(kept, without[0]["metrics"], strict=True):
        assert one["loss/kl"] == pytest.approx(other["loss/kl"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_hold_half_of_the_reference_each(folder: Path, stage: int) -> None:
    for rank in range(2):
        share = rank_results(folder, f"stage{stage}", 2, rank)["share"]
        assert share == pytest.approx(0.5, abs=0.01)
    assert rank_results(folder, "stage0", 1)["share"] == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_learner_scores_no_replay_again(folder: Path, ranks: int) -> None:
    assert (folder / f"learner-{ranks}" / TAG / REFERENCE).is_file()
    old = {t.id for t in works()[1].replays}
    expected = rank_results(folder, "stage0", ranks)["metrics"]
    for rank in range(ranks):
        found = rank_results(folder, "resumed", ranks, rank)
        assert not old & {name for step in found["scored"] for name in step}
        assert any(old & set(step) for step in found["trained"])
    resumed = rank_results(folder, "resumed", ranks)["metrics"]
    for one, other in zip(resumed, expected[1:], strict=True):
        assert one["loss/kl"] == pytest.approx(other["loss/kl"], rel=1e-6)


def test_what_another_reference_computed_is_not_taken_over() -> None:
    key = ("00000001.0", 3, 4)
    cache = ReferenceCache(10, "one float32")
    cache.note(key, np.array([-1.0, -2.0], dtype=np.float32))
    packed = cache.packed(cache.state())
    same, other = ReferenceCache(10, "one float32"), ReferenceCache(10, "other float32")
    assert (same.load(packed), other.load(packed)) == (1, 0)
    assert same[key].tolist() == [-1.0, -2.0] and key not in other
    empty = ReferenceCache(10, "one float32")
    assert empty.load(ReferenceCache(10, "one float32").packed(empty.state())) == 0


if __name__ == "__main__":
    rank_main(work)
