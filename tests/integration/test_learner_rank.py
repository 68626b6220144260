"""A learner rank whose model goes wrong: NaN losses and gradients are left out, counted, named, and
end the run.

The buffer is replaced by a list of steps; everything between receiving a step and committing it is
the real code."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import avatar_rl.learner.batch.microbatch
from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import MicroBatch
from avatar_rl.learner.batch.plan import StepPlan, StepWork
from avatar_rl.learner.clock import Clock
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.model.policy import PolicyOutput
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.rank import LearnerRank
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig
from avatar_rl.prompts.encoding.template import EncodedPrompt
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


class UnluckyRank(LearnerRank):
    """Its model gives NaN where ``TROUBLE`` says so."""

    def __init__(self, spec: LearnerSpec, rank: int, ranks: int) -> None:
        self.spec, self.rank, self.ranks = spec, rank, ranks
        self.reference = self.buffer = self.sender = self.cold_start = self.state_replica = (
            self.outbox
        ) = None
        self.skipped, self.clock = 0, Clock()
        self.committed: list[int] = []
        self.events: list[str] = []  # of the last step
        self.encoded_at: list[int] = []  # `moves` at every encoding
        self.step = -1

    def _setup_rl(self, dtype: str) -> None:
        pass

    def _collect(self, step: int) -> StepWork:
        self.events.clear()
        return step_work(step)

    def _encode(self, trajectory: Trajectory) -> EncodedPrompt:
        self.encoded_at.append(self.moves)
        return encoded(int(trajectory.prompt_id[1:]))

    def _commit(self, work: StepWork, weights: dict[str, Tensor]) -> None:
        self.committed.append(work.step)

    def _loss(
        self,
        plan: StepPlan,
        indices: list[int],
        rows: Any,
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
        value = super()._loss(plan, indices, rows, batch, output, step_metrics)
        if what == "gradient" and culprit in names:
            value = value + (output.logprobs.sum() * 0.0).abs().sqrt()  # 0, but its gradient is NaN
        return value


def watch_collation(events: list[str]) -> None:
    """Have every micro-batch that is made noted."""

    def made(**fields: Any) -> MicroBatch:
        events.append("collate")
        return MicroBatch(**fields)

    avatar_rl.learner.batch.microbatch.MicroBatch = made  # type: ignore[assignment,misc]


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
    for patience, mismatch in ((1, "none"), (10, "token_truncate")):
        config = LearnerConfig(
            objective=ObjectiveConfig(beta=0, mismatch=mismatch),
            optimizer=OptimizerConfig(lr=1e-2, dtype="float32"),
            micro_batch_tokens=16,
            max_skipped=patience,
            warmup=0,
        )
        spec = LearnerSpec(
            run_id="r",
            seed=0,
            model=folder / "text",
            reference=folder / "text",
            datasets=(),
            data=DataConfig(),
            media=MediaConfig(),
            template=TemplateConfig(),
            learner=config,
            sft=None,
            buffer=BufferConfig(),
            redis_url="",
            steps=5,
            replayed=0,
            max_tokens=8,
            step_timeout_s=1.0,
        )
        unlucky = UnluckyRank(spec, rank, ranks)
        unlucky.setup("127.0.0.1", 1)  # the group has met already
        watch_collation(unlucky.events)
        weights, metrics, error = [unlucky.engine.state_dict()], [], ""
        for step in range(5):
            try:
                metrics.append(unlucky.train_step(step).get("metrics"))
            except ModelError as caught:
                error = str(caught)
            weights.append(unlucky.engine.state_dict())
            if error:
                break
        found[f"patience-{patience}"] = {
            "weights": weights,
            "metrics": metrics,
            "error": error,
            "committed": unlucky.committed,
            "events": unlucky.events,
            "encoded_at": unlucky.encoded_at,
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
    assert len(events) > 2


def test_encoding_counts_as_progress(folder: Path) -> None:
    """A step's media may take minutes to decode, before the first forward."""
    moves = rank_results(folder, "patience-10", 1)["encoded_at"]
    assert len(set(moves)) == len(moves) == 6 * 4


def test_an_export_copies_the_weights_on_the_rank_that_writes_them(folder: Path) -> None:
    copies = [rank_results(folder, "patience-10", 2, rank)["copies"] for rank in (0, 1)]
    assert copies == [len(load_file(folder / "export" / "model.safetensors")), 0]


if __name__ == "__main__":
    rank_main(work)
