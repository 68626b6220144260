"""What a tiny model hides of ZeRO: ranks that need another number of packs, runs of the head or of
an encoder, and the gradients that DeepSpeed keeps of parameters a step does not use.

Ranks are processes of this module (`tests.ranks`); they write what they got and the tests compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import avatar_rl.learner.engine
import avatar_rl.learner.model.head
from avatar_rl.learner.batch.microbatch import MicroBatch, Pending, Row
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.model.policy import PolicyOutput
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.integration.test_learner_engine import (
    RATES,
    TOLERANCE,
    difference,
    make_engine,
    settings,
    text_rows,
    train,
)
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import ArrayLoader, audio, build_vision_language, image, make_prompt, video

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_zero3"
STAGES = [
    (stage, offload) for offload in (False, True) for stage in range(4) if stage or not offload
]


class StandIn(torch.optim.AdamW):
    """For the optimiser that offloads run on, which takes minutes to compile."""

    def __init__(self, groups: Any, *, adamw_mode: bool, **options: Any) -> None:
        assert adamw_mode
        super().__init__(groups, **options)


def rows_of(model: Path, *kinds: str) -> list[Row]:
    """A completion each of prompts with the media that ``kinds`` name, "image+video" say; "" for
    none."""
    loader = ArrayLoader()
    encoder = PromptEncoder(model, loader, TemplateConfig())
    rng, rows = np.random.default_rng(1), []
    for number, kind in enumerate(kinds):
        made = {"image": image(number), "video": video(number, 4, 2.0), "audio": audio(number, 1.0)}
        prompt = make_prompt(loader, f"p{number}", [made[word] for word in kind.split("+") if word])
        tokens = rng.integers(30, 400, 6).astype(np.int32)
        rows.append(Row((prompt.id, False), encoder.encode(prompt, hinted=False), tokens))
    return rows


def step_of(engine: TrainEngine, rows: list[Row], total: int | None = None) -> float:
    """A step with one pack per row, of ``total`` in all ranks; returns the gradient's norm."""
    batches = [Pending([row]) for row in rows]

    def loss(_: int, batch: MicroBatch, output: PolicyOutput) -> Tensor:
        return (0.1 / (total or len(rows))) * output.logprobs.sum()

    engine.accumulate(batches, loss, batches[0])
    return engine.step(0.01)


# -- what a rank does ------------------------------------------------------------------------------


def head_runs(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Norms and weights after three steps in which ranks have unequally many completion tokens, by
    the tiled head and by one that is more than a linear layer."""
    found: dict[str, Any] = {}
    for stage, wrapped in ((0, False), (3, False), (3, True)):
        engine = make_engine(folder / "text", settings(stage), ranks, wrapped=wrapped)
        norms = train(engine, text_rows(), rank, ranks)
        weights = {n.replace("lm_head.0.", "lm_head."): w for n, w in engine.state_dict().items()}
        found[f"{stage}-{wrapped}"] = {"norms": norms, "weights": weights}
    return found


#: Packs of each rank, and the parts of the model that are frozen.
MIXED: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], tuple[str, ...]]] = {
    "frozen": ((("video+audio", "image"), ("", "video", "audio")), ("visual", "audio_tower")),
    "trained": ((("video+audio", "image"), ("", "video", "audio")), ()),
    "one kind each": ((("image",), ("video",)), ()),
    "twice and once": ((("image+video",), ("video",)), ()),
    "a rank with text": ((("video+audio",), ("",)), ()),
}


def mixed_media(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Weights and norms after two steps in which ranks have other media, and unequally many packs;
    with recomputation or without."""
    found: dict[str, Any] = {}
    for name, (shares, freeze) in MIXED.items():
        rows = rows_of(folder / "omni", *shares[0], *shares[1])
        first = len(shares[0])
        mine = rows if ranks == 1 else (rows[first:] if rank else rows[:first])
        for stage in (0, 1, 2, 3) if ranks > 1 else (0,):
            config = settings(stage, eps=1e-3, freeze=freeze)
            engine = make_engine(folder / "omni", config, ranks, recomputed=stage != 1)
            norms = [step_of(engine, mine, len(rows)) for _ in range(2)]
            found[f"{name}-{stage}"] = {"norms": norms, "weights": engine.state_dict()}
    return found


def unused(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Weights after a step with sound, one without, and one whose first micro-batch has none.

    AdamW without memory: what a parameter does in a step comes from that step's gradient alone.
    """
    found: dict[str, Any] = {}
    sound, silent = rows_of(folder / "omni", "audio", "")
    for stage, offload in STAGES:
        config = settings(
            stage, betas=(0.0, 0.0), eps=1e-3, weight_decay=0.0, offload_optimizer=offload
        )
        engine = make_engine(folder / "omni", config, ranks)
        weights, norms = [engine.state_dict()], []
        for rows in ([sound], [silent], [silent, sound]):
            norms.append(step_of(engine, rows))
            weights.append(engine.state_dict())
        found[f"{stage}-{offload}"] = {"weights": weights, "norms": norms}
    return found


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    import deepspeed.ops.adam

    avatar_rl.learner.engine.WHOLE_BELOW = 0
    deepspeed.ops.adam.DeepSpeedCPUAdam = StandIn
    found = {
        "unused": unused(folder, rank, ranks),
        "mixed_media": mixed_media(folder, rank, ranks),
    }
    if ranks > 1:
        avatar_rl.learner.model.head.TILE = 4
        found["head_runs"] = head_runs(folder, rank, ranks)
    return found


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one rank alone and of two together."""
    folder = tmp_path_factory.mktemp("zero")
    build_vision_language(folder / "text", "qwen3")
    build_tiny_omni(folder / "omni")
    for ranks in (1, 2):
        run_ranks(MODULE, folder, ranks)
    return folder


@pytest.mark.parametrize("wrapped", [False, True])
def test_ranks_that_need_unequally_many_runs_of_the_head_train_alike(
    folder: Path, wrapped: bool
) -> None:
    """Each run gathers the head's weights, forwards and again backwards: all ranks must run equally
    many."""
    results = rank_results(folder, "head_runs", 2)
    found, expected = results[f"3-{wrapped}"], results["0-False"]
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert difference(found["weights"], expected["weights"]) < TOLERANCE * max(RATES)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MIXED)
def test_two_ranks_with_other_media_and_packs_train_as_one(
    folder: Path, name: str, stage: int
) -> None:
    """A rank without a medium, or without a pack, runs the encoder or the model all the same."""
    alone = rank_results(folder, "mixed_media", 1)[f"{name}-0"]
    for rank in (0, 1):
        found = rank_results(folder, "mixed_media", 2, rank)[f"{name}-{stage}"]
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert difference(found["weights"], alone["weights"]) < TOLERANCE * 0.01


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_a_parameter_that_a_step_does_not_use_stays_as_it_is(
    folder: Path, stage: int, offload: bool, ranks: int
) -> None:
    results = rank_results(folder, "unused", ranks)
    found, expected = results[f"{stage}-{offload}"], results["0-False"]
    sound = [
        {n: w for n, w in weights.items() if "audio_tower" in n} for weights in found["weights"]
    ]
    assert difference(sound[1], sound[0]) > 1e-3
    assert difference(sound[2], sound[1]) == 0
    assert difference(sound[3], sound[2]) > 1e-3
    for weights, others in zip(found["weights"], expected["weights"], strict=True):
        assert difference(weights, others) < TOLERANCE
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)


if __name__ == "__main__":
    rank_main(work)
