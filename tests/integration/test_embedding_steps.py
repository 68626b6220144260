"""Whole steps on two ranks under ZeRO: with stored embeddings the weights become what they become
from pixels, and ranks may meet any mix of media."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.media.ahead import AheadEncoder
from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.towers import Towers
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.model.reference import ReferencePolicy
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.state import StateReplicator
from avatar_rl.learner.step import StepTrainer
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.embeddings.names import TOWERS
from avatar_rl.prompts.embeddings.store import EmbeddingStore
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from benchmarks.learner_side import make_spec, make_step, settings
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import ArrayLoader, audio, image, make_prompt, video

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_embedding_steps"
STAGES, STEPS, RATE = (0, 2, 3), 2, 1e-3


def prompts_of(loader: ArrayLoader) -> list[Prompt]:
    """Media that one rank has and the other lacks, whatever the split."""
    return [
        make_prompt(loader, "a", [image(1)]),
        make_prompt(loader, "b", [video(2, 4, 2.0), audio(3, 1.5)]),
        make_prompt(loader, "c", []),
        make_prompt(loader, "d", [video(4, 8, 2.0), audio(5, 3.9)], audio_in_video=True),
    ]


def trained(folder: Path, rank: int, ranks: int, stage: int, *, stored: bool) -> dict[str, Any]:
    loader = ArrayLoader()
    prompts = prompts_of(loader)
    plain = PromptEncoder(folder / "model", loader, TemplateConfig())
    encoder: PromptEncoder | AheadEncoder = plain
    if stored:

        def towers() -> Towers:
            return Towers(folder / "model", dtype="float32", device=torch.device("cpu"))

        store = EmbeddingStore(folder / "store", 1 << 28)
        encoder = AheadEncoder(StoredEncoder(plain, store, "r", towers), None)
    config = settings(1, optimizer={"freeze": TOWERS, "zero_stage": stage}, micro_batch_tokens=1024)
    spec = make_spec(folder / "model", folder / "model", config)
    engine = TrainEngine(
        Policy(load_model(spec.model)).eval(),
        config.optimizer,
        world_size=ranks,
        dtype="float32",
    )
    trainer = StepTrainer(
        spec,
        rank,
        ranks,
        engine,
        PromptIndex(prompts),
        encoder,
        StateReplicator(engine, rank, None, max_bytes=0),
        reference=ReferencePolicy(
            spec.reference, dtype="float32", device=engine.device, cached=1000
        ),
    )
    encoded = {p.id: PromptEncoder.encode(plain, p, False) for p in prompts}
    norms = []
    for number in range(STEPS):
        rng = np.random.default_rng(number)
        work = make_step(number, encoded, rng, shortest=3, longest=9, tokens=(30, 400))
        trainer.forward_backward(trainer.plan(work), StepMetrics())
        norms.append(engine.step(RATE))
    decoded = loader.loads
    return {"weights": engine.state_dict(), "norms": norms, "decoded": decoded}


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    return {
        f"{'stored' if stored else 'pixels'}{stage}": trained(
            folder, rank, ranks, stage, stored=stored
        )
        for stage in STAGES
        for stored in (False, True)
    }


def test_steps_on_mixed_media_are_the_same_from_the_store(tmp_path: Path) -> None:
    build_tiny_omni(tmp_path / "model")
    run_ranks(MODULE, tmp_path, 2)
    policy = Policy(load_model(tmp_path / "model"))
    before = {n.removeprefix("model."): p.detach() for n, p in policy.named_parameters()}
    for stage in STAGES:
        for rank in range(2):
            pixels = rank_results(tmp_path, f"pixels{stage}", 2, rank)
            stored = rank_results(tmp_path, f"stored{stage}", 2, rank)
            assert stored["norms"] == pytest.approx(pixels["norms"], rel=1e-4)
            assert min(pixels["norms"]) > 1e-3
            # AdamW makes large steps of gradients that are zero but for rounding: by norms.
            gap = moved = 0.0
            for name, value in pixels["weights"].items():
                gap += float((stored["weights"][name] - value).square().sum())
                moved += float((value - before[name]).square().sum())
            assert gap**0.5 <= 1e-3 * moved**0.5, stage
            assert moved**0.5 > RATE
    assert list((tmp_path / "store").glob("*.embedding"))


if __name__ == "__main__":
    rank_main(work)
