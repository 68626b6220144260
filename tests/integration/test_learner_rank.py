"""A learner rank whose model goes wrong: NaN losses and gradients are left out, counted, named, and
end the run.

The buffer is replaced by a list of steps; everything between receiving a step and committing it is
the real code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import avatar_rl.learner.batch.microbatch
from avatar_rl.buffer_service.records.requests import PromptKl
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.weights.sender import Outbox
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import MicroBatch, Row, collate
from avatar_rl.learner.batch.plan import StepPlan, StepSource, StepWork
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.model.policy import PolicyOutput
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.publication import Publication
from avatar_rl.learner.rank import LearnerRank
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.step import StepTrainer
from avatar_rl.learner.turn import RankTurn
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from benchmarks.learner_side import make_spec
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import build_vision_language

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_learner_rank"
#: What goes wrong in which step, and through which trajectory.
TROUBLE = {1: ("loss", "00000004.1"), 2: ("gradient", "00000006.0")}
EMPTY_STEP = 3
PROMPTS = 3


def encoded(number: int) -> EncodedPrompt:
    length = 5 + number
    return EncodedPrompt(torch.arange(10, 10 + length), torch.arange(length)[None], length)


def step_work(step: int) -> StepWork:
    """Three groups of two; none at all in the empty step, as when every group was dropped."""
    rng = np.random.default_rng(step)
    groups = []
    for number in range(0 if step == EMPTY_STEP else PROMPTS):
        seq = PROMPTS * step + number
        name = f"{seq:08d}"
        members = tuple(
            Trajectory(
                id=f"{name}.{i}",
                group_id=name,
                prompt_id=f"p{number}",
                index=i,
                hinted=False,
                prompt_tokens=5 + number,
                prompt_digest=0,
                token_ids=rng.integers(10, 250, 4 + i).astype(np.int32),
                logprobs=np.full(4 + i, -5.5, dtype=np.float32),
                versions=((step, 4 + i),),
                finish_reason="stop",
                temperature=1.0,
                reward=float(i),
                components={},
                step=step,
            )
            for i in range(2)
        )
        groups.append(
            Group(
                id=name,
                prompt_id=f"p{number}",
                seq=seq,
                step=step,
                hinted=False,
                trajectories=members,
            )
        )
    return StepWork(step, step, tuple(groups), (), ())


class Numbers:
    """Prompts by id, "p2" being 2."""

    def __getitem__(self, prompt_id: str) -> int:
        return int(prompt_id[1:])


class Encoder:
    warnings: tuple[str, ...] = ()
    kind = "qwen3"

    def encode(self, prompt: int, hinted: bool) -> EncodedPrompt:
        return encoded(prompt)


class Steps:
    """Rank 0's buffer: a list of steps, and which of them were committed."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.committed: list[int] = []
        self.kls: dict[int, dict[str, PromptKl]] = {}

    def collect(self, step: int, waiting: Callable[[], None]) -> StepWork:
        self.events.clear()
        return step_work(step)

    def commit(self, work: StepWork) -> None:
        self.committed.append(work.step)

    def report_behaviour_kl(self, step: int, found: Sequence[PromptKl]) -> None:
        assert all(np.isfinite(one.k3) and one.tokens > 0 for one in found)
        self.kls[step] = {one.prompt_id: one for one in found}


class UnluckyTrainer(StepTrainer):
    """Its model gives NaN where ``TROUBLE`` says so."""

    events: list[str]  # of the last step
    encoded_at: list[int]  # ``moves`` at every encoding

    def encode(self, trajectory: Trajectory) -> Row:
        row = super().encode(trajectory)
        self.encoded_at.append(self.moves)
        return row

    def loss(
        self,
        plan: StepPlan,
        indices: list[int],
        rows: list[Row],
        batch: MicroBatch,
        output: PolicyOutput,
        step_metrics: StepMetrics,
    ) -> Tensor:
        self.events.append("loss")
        what, culprit = TROUBLE.get(plan.trajectories[0].step, ("", ""))
        names = [plan.trajectories[i].id for i in indices]
        if what == "loss" and culprit in names:
            broken = output.logprobs.clone()
            broken[names.index(culprit)] = torch.nan
            output = output._replace(logprobs=broken)
        value = super().loss(plan, indices, rows, batch, output, step_metrics)
        if what == "gradient" and culprit in names:
            value = value + (output.logprobs.sum() * 0.0).abs().sqrt()  # 0, but its gradient is NaN
        return value


class UnluckyRank(LearnerRank):
    """Needs no dataset, tokenizer, weight store or buffer."""

    trainer: UnluckyTrainer

    def __init__(self, spec: LearnerSpec, rank: int, ranks: int) -> None:
        self.spec, self.rank, self.ranks = spec, rank, ranks
        self.prompts, self.encoder = (
            cast("PromptIndex", Numbers()),
            cast("PromptEncoder", Encoder()),
        )
        self.outbox = cast("Outbox", None)
        self.cold_start = self.state_replica = None
        self.turn = RankTurn(None)
        self.events: list[str] = []
        self.steps = Steps(self.events)

    def make_trainer(self, dtype: str) -> UnluckyTrainer:
        trainer = UnluckyTrainer(
            self.spec,
            self.rank,
            self.ranks,
            self.engine,
            self.prompts,
            self.encoder,
            self.replicator,
            source=cast("StepSource", self.steps) if self.rank == 0 else None,
            publication=mock.create_autospec(Publication, instance=True),
            routers=self.routers,
        )
        trainer.events, trainer.encoded_at = self.events, []
        return trainer


def watch_collation(events: list[str]) -> None:
    """Have every micro-batch that is made noted."""

    def noted(rows: Sequence[Row]) -> MicroBatch:
        events.append("collate")
        return collate(rows)

    avatar_rl.learner.batch.microbatch.collate = noted


def exported(rank: LearnerRank, out: Path) -> int:
    """Copies of weights that an export made on this rank."""
    copies, plain = 0, Tensor.to

    def to(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nonlocal copies
        copies += options.get("copy", False)
        return plain(tensor, *arguments, **options)

    with mock.patch.object(Tensor, "to", to):
        rank.export(out)
    return copies


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Steps until an error, with the run's patience at one and at ten."""
    found = {}
    for patience, old in ((1, "behaviour"), (10, "trainer")):
        config = LearnerConfig(
            objective=ObjectiveConfig(beta=0, old_logprobs=old),
            optimizer=OptimizerConfig(lr=1e-2, dtype="float32"),
            micro_batch_tokens=16,
            max_skipped=patience,
            warmup=0,
        )
        spec = make_spec(folder / "text", folder / "text", config, steps=5, max_tokens=8)
        unlucky = UnluckyRank(spec, rank, ranks)
        unlucky.setup("127.0.0.1", 1)  # the group has met already
        watch_collation(unlucky.events)
        weights, metrics, error = [unlucky.engine.state_dict()], [], ""
        for step in range(5):
            try:
                report = unlucky.train_step(step)
                metrics.append(report["metrics"] if report is not None else None)
            except ModelError as caught:
                error = str(caught)
            weights.append(unlucky.engine.state_dict())
            if error:
                break
        found[f"patience-{patience}"] = {
            "weights": weights,
            "metrics": metrics,
            "error": error,
            "committed": unlucky.steps.committed,
            "events": unlucky.events,
            "encoded_at": unlucky.trainer.encoded_at,
            "copies": exported(unlucky, folder / "export"),
        }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rank")
    build_vision_language(folder / "text", "qwen3")
    for ranks in (1, 2):
        run_ranks(MODULE, folder, ranks)
    return folder


def moved(weights: list[dict[str, Tensor]], step: int) -> float:
    """Largest change that ``step`` made to any weight."""
    before, after = weights[step], weights[step + 1]
    return max(float((after[name] - before[name]).abs().max()) for name in after)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_losses_and_gradients_are_left_out_and_counted(folder: Path, ranks: int) -> None:
    found = rank_results(folder, "patience-10", ranks)
    assert found["error"] == ""
    assert found["committed"] == [0, 1, 2, 3, 4]  # every step, whatever was left out of it
    assert [m["learner/skipped"] for m in found["metrics"]] == [0, 1, 2, 2, 2]
    changes = [moved(found["weights"], step) for step in range(5)]
    assert changes[2] == changes[EMPTY_STEP] == 0  # a NaN gradient, no group at all
    assert min(changes[0], changes[1], changes[4]) > 1e-3  # the rest of step 1 is trained
    assert found["metrics"][2]["grad_norm"] == np.inf
    assert all(np.isfinite(m["loss/policy"]) for m in found["metrics"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_stops_at_the_same_step_and_names_the_trajectories(
    folder: Path, ranks: int
) -> None:
    for rank in range(ranks):
        found = rank_results(folder, "patience-1", ranks, rank)
        assert len(found["metrics"]) == 2
        assert "learner.max_skipped = 1" in found["error"] and "00000006.0" in found["error"]
    assert rank_results(folder, "patience-1", ranks)["committed"] == [0, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_media_are_collated_one_micro_batch_at_a_time(folder: Path, ranks: int) -> None:
    events = rank_results(folder, "patience-10", ranks)["events"]
    assert events == ["collate", "loss"] * (len(events) // 2)
    assert len(events) > (2 if ranks == 1 else 0)  # one rank alone has several packs


def test_encoding_counts_as_progress(folder: Path) -> None:
    """A step's media may take minutes to decode, before the first forward."""
    moves = rank_results(folder, "patience-10", 1)["encoded_at"]
    assert len(set(moves)) == len(moves) == 6 * 4


def test_an_export_copies_the_weights_on_the_rank_that_writes_them(folder: Path) -> None:
    copies = [rank_results(folder, "patience-10", 2, rank)["copies"] for rank in (0, 1)]
    assert copies == [len(load_file(folder / "export" / "model.safetensors")), 0]


if __name__ == "__main__":
    rank_main(work)
