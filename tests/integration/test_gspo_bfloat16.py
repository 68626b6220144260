"""GSPO in bfloat16 between two implementations of one model, through the learner's own policy and
step (docs/method.md 1.1, 2.3). One rank, a process of this module (`tests.ranks`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.learner.batch.plan import StepWork
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.state import StateReplicator
from avatar_rl.learner.step import StepTrainer
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from benchmarks.learner_side import make_spec
from tests.ranks import rank_main, rank_results, run_ranks

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_gspo_bfloat16"
GROUPS, GROUP, PROMPT, TOKENS, VOCABULARY = 2, 8, 8, 64, 128
RATES = (3e-6, 1e-4)
DTYPES = ("bfloat16", "float32")


def prompt_ids(number: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(number))


class Prompts:
    """Prompts by id, "p1" being 1."""

    def __getitem__(self, prompt_id: str) -> int:
        return int(prompt_id[1:])


class Encoder:
    def encode(self, prompt: int, hinted: bool) -> EncodedPrompt:
        ids = prompt_ids(prompt)
        digest = prompt_digest(ids)
        return EncodedPrompt(ids, torch.arange(PROMPT)[None], PROMPT, digest=digest)


def build(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    model.save_pretrained(folder)


@torch.no_grad()
def sampled(folder: Path, dtype: str) -> StepWork:
    """A step's completions with the log-probabilities of another implementation of the model:
    transformers' own, with padded rows and attention written out."""
    model: nn.Module = transformers.Qwen2ForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    rng, groups = np.random.default_rng(1), []
    for number in range(GROUPS):
        tokens = rng.integers(0, VOCABULARY, (GROUP, TOKENS)).astype(np.int32)
        ids = torch.cat([prompt_ids(number).expand(GROUP, -1), torch.from_numpy(tokens).long()], 1)
        logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None])[..., 0].numpy()
        name = f"{number:08d}"
        members = tuple(
            Trajectory(
                id=f"{name}.{i}",
                group_id=name,
                prompt_id=f"p{number}",
                index=i,
                hinted=False,
                prompt_tokens=PROMPT,
                prompt_digest=prompt_digest(prompt_ids(number)),
                token_ids=tokens[i],
                logprobs=logprobs[i].astype(np.float32),
                versions=((0, TOKENS),),
                finish_reason="stop",
                temperature=1.0,
                reward=float(i % 2),
                components={},
                step=0,
            )
            for i in range(GROUP)
        )
        groups.append(
            Group(
                id=name,
                prompt_id=f"p{number}",
                seq=number,
                step=0,
                hinted=False,
                trajectories=members,
            )
        )
    return StepWork(0, 0, tuple(groups), (), ())


@dataclass(frozen=True)
class Case:
    """A learner of one dtype with engines of the same."""

    dtype: Any
    rule: Any
    lr: float

    def __str__(self) -> str:
        return f"{self.dtype}-{self.rule}-{self.lr:g}"


CASES = [Case(dtype, "auto", lr) for dtype in DTYPES for lr in RATES]
CASES += [Case("bfloat16", "behaviour", lr) for lr in RATES]


def clip_shares(folder: Path, case: Case) -> list[float]:
    """Share of the tokens clipped in both updates of one step."""
    config = LearnerConfig(
        objective=ObjectiveConfig(
            ratio="sequence",
            epsilon=3e-4,
            epsilon_high=4e-4,
            beta=0,
            tas_lambda=0,
            old_logprobs=case.rule,
        ),
        optimizer=OptimizerConfig(lr=case.lr, dtype=case.dtype),
        updates=2,
        warmup=0,
        micro_batch_tokens=PROMPT + GROUP * TOKENS,
    )
    model = folder / "model"
    spec = make_spec(model, model, config, steps=2, max_tokens=TOKENS, engine_dtype=case.dtype)
    policy = Policy(load_model(spec.model, dtype=case.dtype))
    engine = TrainEngine(policy, config.optimizer, world_size=1, dtype=case.dtype)
    trainer = StepTrainer(
        spec,
        0,
        1,
        engine,
        cast("PromptIndex", Prompts()),
        cast("PromptEncoder", Encoder()),
        StateReplicator(engine, 0, None, max_bytes=0),
    )
    step, shares = sampled(spec.model, case.dtype), []
    for number in range(config.updates):
        metrics = StepMetrics()
        trainer.forward_backward(trainer.plan(step.update(number, config.updates)), metrics)
        trainer.old.share()
        engine.step(case.lr)
        shares.append(metrics.metrics()["clip_fraction/fresh"])
    return shares


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    return {str(case): clip_shares(folder, case) for case in CASES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gspo")
    build(folder / "model")
    run_ranks(MODULE, folder, 1)
    return folder


@pytest.mark.parametrize("lr", RATES)
def test_gspo_in_bfloat16_clips_nothing_on_policy(folder: Path, lr: float) -> None:
    """The ranges are those of the paper (docs/method.md 2.3), the updates such that move the policy
    by more than they allow."""
    half, full = (rank_results(folder, str(Case(dtype, "auto", lr)), 1) for dtype in DTYPES)
    assert half[0] < 0.01
    assert half[1] <= full[1] + 0.01
    assert full[1] > 0.9  # the second update is one that clips
    # What it was: against the sampler's log-probabilities.
    assert rank_results(folder, str(Case("bfloat16", "behaviour", lr)), 1)[0] > 0.2


if __name__ == "__main__":
    rank_main(work)
