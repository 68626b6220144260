"""A prompt that cannot be encoded is left out of a step or a cold start; neither ends with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from avatar_rl.cluster.workers.pool import start_failure
from avatar_rl.common.errors import ConfigError, DataError, ModelError, ResourceError
from avatar_rl.learner.config import LearnerConfig, SftConfig
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.sft import ColdStart
from avatar_rl.learner.step import StepTrainer
from avatar_rl.prompts.encoding.template import EncodedPrompt
from avatar_rl.prompts.record import ProblemType, Prompt


class Encoder:
    """Cannot encode the prompts of ``bad``, nor format those of ``unsaid``."""

    def __init__(self, bad: set[str], unsaid: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.bad, self.unsaid = bad, unsaid
        self.tokenizer: Any = lambda text, **settings: {"input_ids": [1, 2, 3]}
        setattr(self.tokenizer, "eos_token_id", 0)  # noqa: B010  (a function has no such attribute)

    def text(self, prompt: Prompt, hinted: bool) -> str:
        if prompt.id in self.unsaid:
            raise DataError(f"prompt {prompt.id!r}: the model's chat template refuses it")
        return prompt.question

    def encode(self, prompt: Any, hinted: bool) -> EncodedPrompt:
        name = getattr(prompt, "id", prompt)
        if name in self.bad:
            raise DataError(f"prompt {name!r}: the model's processor refuses it")
        return EncodedPrompt(torch.arange(3), torch.arange(3)[None], 3, digest=7)


class Peer:
    """A rank that shares packs and lacks the media of some completions."""

    def __init__(self, lacks: set[int]) -> None:
        self.lacks = lacks

    def common(self, numbers: Any) -> set[int]:
        return set(numbers) - self.lacks


class Engine:
    """Notes the micro-batches that it is given."""

    def __init__(self, peer: Peer | None = None) -> None:
        self.policy = SimpleNamespace(sequence=peer)
        self.world_size = 1
        self.device = torch.device("cpu")
        self.given: list[list[str]] = []
        self.spare = ""

    def accumulate(self, micro_batches: list[Any], loss: Any, spare: Any) -> None:
        self.given = [[row.key[0] for row in batch.rows] for batch in micro_batches]
        self.spare = spare.rows[0].key[0]

    def step(self, lr: float) -> float:
        return 1.0


def trained(bad: set[str], peer: Peer | None = None) -> tuple[Engine, StepMetrics, list[list[int]]]:
    """A rank's share of five completions of three prompts, in three micro-batches."""
    engine, metrics = Engine(peer), StepMetrics()
    names = ("a", "a", "b", "c", "c")
    trajectories = [
        SimpleNamespace(
            id=f"{i}",
            prompt_id=name,
            hinted=False,
            prompt_digest=7,
            prompt_tokens=3,
            token_ids=np.arange(2, dtype=np.int32),
            temperature=1.0,
        )
        for i, name in enumerate(names)
    ]
    shares = [[[0, 1], [2], [3, 4]]]
    plan: Any = SimpleNamespace(trajectories=trajectories, shares=shares)
    trainer = StepTrainer(
        SimpleNamespace(learner=LearnerConfig()),  # type: ignore[arg-type]
        1,
        2,
        engine,  # type: ignore[arg-type]
        {name: name for name in names},  # type: ignore[arg-type]
        Encoder(bad),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
    trainer.rank, plan.shares = 1, [[], *shares]
    trainer.forward_backward(plan, metrics)
    return engine, metrics, plan.shares[1]


def test_completions_whose_prompt_cannot_be_encoded_are_left_out_of_a_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, metrics, share = trained(set())
    assert engine.given == [["a", "a"], ["b"], ["c", "c"]] and metrics.unreadable == 0
    engine, metrics, share = trained({"b"})
    assert engine.given == [["a", "a"], ["c", "c"]] and metrics.unreadable == 1
    assert share == [[0, 1], [3, 4]]  # what the engine calls its second micro-batch
    assert "trajectory 2 left out: prompt 'b'" in caplog.text
    other = StepMetrics(unreadable=2)
    other.merge(metrics)
    assert other.unreadable == 3


def test_what_a_rank_that_shares_the_pack_cannot_encode_is_left_out_here_too() -> None:
    engine, metrics, share = trained({"b"}, Peer({3, 4}))
    assert (engine.given, share, metrics.unreadable) == ([["a", "a"]], [[0, 1]], 3)


def test_a_rank_that_is_left_with_nothing_takes_part_with_any_that_can_be_encoded() -> None:
    engine, metrics, _ = trained({"a", "b"})
    assert (engine.given, engine.spare, metrics.unreadable) == ([["c", "c"]], "c", 3)
    with pytest.raises(DataError, match="prompt 'c': the model's processor refuses it"):
        trained({"a", "b", "c"})


def cold_start(count: int, encoder: Encoder) -> tuple[ColdStart, Engine]:
    prompts = [
        Prompt(
            id=f"p{i}",
            question="Which?",
            answer="B",
            problem_type=ProblemType.MULTIPLE_CHOICE,
            options=("A. red", "B. green"),
            reasoning="so",
        )
        for i in range(count)
    ]
    engine, config = Engine(), SftConfig(steps=4, batch_size=5)
    start = ColdStart(engine, encoder, prompts, config, rank=0)  # type: ignore[arg-type]
    return start, engine


def test_a_cold_start_continues_without_rows_that_cannot_be_encoded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    start, engine = cold_start(10, Encoder({"p3", "p7"}))
    seen: set[str] = set()
    for update in range(4):
        start.run(update, 1)
        seen |= {name for batch in engine.given for name in batch}
    assert seen == {f"p{i}" for i in range(10)} - {"p3", "p7"}
    assert caplog.text.count("left out") == 2  # once each, though met twice
    start, _ = cold_start(10, Encoder({"p1", "p3", "p7"}))
    with pytest.raises(DataError, match=r"3 of 10 cold-start prompts.*avatar data validate"):
        start.run(0, 4)


def test_a_cold_start_says_before_training_what_the_template_refuses() -> None:
    with pytest.raises(DataError, match="prompt 'p4': the model's chat template refuses it"):
        cold_start(10, Encoder(set(), {"p4"}))


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("avatar_rl.common.errors.ModelError: no template: add it", ModelError, "^no template"),
        ("avatar_rl.common.errors.ConfigError: a\nb", ConfigError, "^a\nb$"),
        ("avatar_rl.common.errors.InputError: f:1: bad; cure it", DataError, "^f:1: bad; cure it$"),
        ("ValueError: avatar_rl.common.errors.ModelError: x", ResourceError, "ranks died while"),
        ("Segmentation fault", ResourceError, "learner ranks died while starting"),
    ],
)
def test_what_a_constructor_raised_is_raised_as_itself(
    text: str, kind: type[Exception], words: str
) -> None:
    trace = (
        f"The actor died because of an error raised in its creation task,\n  File x, in y\n{text}"
    )
    with pytest.raises(kind, match=words) as caught:
        raise start_failure(RuntimeError(trace), "learner ranks")
    assert type(caught.value) is kind


def test_validate_lists_what_the_template_refuses(tiny_omni: Path, tmp_path: Path) -> None:
    from avatar_rl.prompts.config import DataConfig
    from avatar_rl.prompts.validate import validate
    from tests.unit.test_template import NO_SYSTEM, with_template

    rows = tmp_path / "rows.jsonl"
    row = {"question": "How many?", "answer": "3", "problem_type": "numerical"}
    rows.write_text(
        json.dumps({**row, "id": "p", "system": "be brief"}) + "\n" + json.dumps({**row, "id": "q"})
    )
    model = with_template(tiny_omni, tmp_path / "model", NO_SYSTEM)
    report = validate(rows, DataConfig(), decode=False, processor_path=model)
    assert report.rows == 2
    [problem] = report.problems
    assert problem.id == "p" and "System role not supported" in problem.what
