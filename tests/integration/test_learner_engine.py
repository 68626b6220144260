"""DeepSpeed ranks against plain torch AdamW: every ZeRO stage, one and two ranks, ranks that hold
unequally much.

Ranks are processes of this module (`tests.ranks`); they write what they got and the tests compare.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import avatar_rl.learner.engine
import avatar_rl.learner.model.names as names_module
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.learner.batch.microbatch import MicroBatch, Row, collate
from avatar_rl.learner.config import OptimizerConfig
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.learner.model.names import NameMap, checkpoint_names
from avatar_rl.learner.model.policy import Policy, PolicyOutput
from avatar_rl.learner.publication import Publication
from avatar_rl.learner.state import capture, restore, state_bytes
from avatar_rl.learner.state_replica import write_files
from avatar_rl.learner.turn import ParkedState
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import (
    ArrayLoader,
    audio,
    build_vision_language,
    load_reference,
    make_prompt,
    video,
)

#: All ranks' work is done in one fixture; on a busy machine that takes minutes.
pytestmark = pytest.mark.timeout(600)
STAGES = (0, 1, 2, 3)
ENCODERS = ("visual", "audio_tower")
RATES = (1e-2, 3e-3, 2e-2)  # another one every step
SIZES = (0.004, 0.1, 0.03)  # of the loss, so that some gradients are clipped and others not
#: Updates are about the rate in size; float32 gradients summed in another order move them by this
#: much of it.
TOLERANCE = 2e-4
#: Global micro-batches as row indices, by rank and number of ranks; in the last step rank 1 has
#: none at all.
SPLITS: dict[int, list[list[list[list[int]]]]] = {
    1: [[[[0, 1], [2], [3, 4, 5]]], [[[0, 1, 2, 3, 4, 5]]], [[[0], [1], [2], [3], [4, 5]]]],
    2: [[[[0, 1], [2]], [[3, 4, 5]]], [[[0]], [[1, 2], [3], [4, 5]]], [[[0, 1, 2], [3, 4, 5]], []]],
}


def settings(stage: int, **changes: Any) -> OptimizerConfig:
    # eps keeps AdamW from magnifying the rounding of gradients that are zero in exact arithmetic
    # (key biases).
    values = {
        "lr": 1.0,
        "eps": 1e-5,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "zero_stage": stage,
    }
    return OptimizerConfig(**(values | {"dtype": "float32"} | changes))  # type: ignore[arg-type]


def text_rows() -> list[Row]:
    """Six completions of three prompts without media."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        length = 5 + number // 2
        ids = torch.arange(10, 10 + length)
        prompt = EncodedPrompt(ids, torch.arange(length)[None], length)
        rows.append(
            Row(
                (f"p{number // 2}", False),
                prompt,
                rng.integers(10, 250, 3 + number).astype(np.int32),
            )
        )
    return rows


def step_loss(
    rows: Sequence[Row], indices: Sequence[int], output: PolicyOutput, step: int
) -> Tensor:
    """This micro-batch's share of a sum over the step; signs and sizes differ by row and step."""
    weights = [(1.0, -0.7, 0.4, -1.3, 0.6, 0.2)[(i + step) % 6] * SIZES[step] for i in indices]
    return (torch.tensor(weights)[:, None] * output.logprobs).sum()


def train(engine: TrainEngine, rows: list[Row], rank: int, ranks: int) -> list[float]:
    """Three steps; returns the gradient norms."""
    norms = []
    for step, rate in enumerate(RATES):
        share = SPLITS[ranks][step][rank]
        batches = [collate([rows[i] for i in indices]) for indices in share]
        spare = batches[0] if batches else collate(rows[:1])

        def loss(
            number: int, _: MicroBatch, output: PolicyOutput, step: int = step, share: Any = share
        ) -> Tensor:
            return step_loss(rows, share[number], output, step)

        engine.accumulate(batches, loss, spare)
        norms.append(engine.step(rate))
    return norms


def make_engine(
    folder: Path,
    config: OptimizerConfig,
    ranks: int,
    dtype: str = "float32",
    *,
    recomputed: bool = False,
    wrapped: bool = False,
) -> TrainEngine:
    """``wrapped`` makes the head more than a linear layer."""
    model = load_model(folder, dtype=dtype)
    if recomputed:
        recompute_activations(model)
    if wrapped:
        model.lm_head = nn.Sequential(model.lm_head)
    return TrainEngine(Policy(model), config, world_size=ranks, dtype=dtype)


# -- what a rank does ------------------------------------------------------------------------------


def parity(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Norms and weights after three steps of every stage, then a step without any gradient."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        engine = make_engine(folder / "text", settings(stage), ranks)
        norms = train(engine, text_rows(), rank, ranks)
        weights = engine.state_dict()
        batch = collate(text_rows()[:2])
        scores = engine.score(batch).logprobs
        engine.accumulate([batch], lambda *arguments: arguments[2].logprobs.sum() * 0.0, batch)
        zero = engine.step(0.0)
        found[f"{stage}"] = {
            "norms": norms,
            "weights": weights,
            "scores": scores,
            "zero": zero,
            "updates": engine.updates,
        }
    return found


def checkpoints(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Weights after captured steps + further steps, and in a fresh engine given that state + the
    same further steps."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        saved = folder / f"state-{ranks}-{stage}"
        engine = make_engine(folder / "text", settings(stage), ranks)
        train(engine, text_rows(), rank, ranks)
        write_files(capture(engine, rank), saved)
        torch.distributed.barrier()
        train(engine, text_rows(), rank, ranks)
        resumed = make_engine(folder / "text", settings(stage), ranks)
        restore(resumed, rank, saved)
        updates = resumed.updates
        train(resumed, text_rows(), rank, ranks)
        found[f"{stage}"] = {
            "through": engine.state_dict(),
            "resumed": resumed.state_dict(),
            "updates": updates,
        }
    return found


def parked(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Weights after steps with the state in host memory between them, and without."""
    found: dict[str, Any] = {}
    rows = text_rows()
    for stage in STAGES:
        stayed, left = (
            make_engine(folder / "text", settings(stage, dtype="bfloat16"), ranks, "bfloat16")
            for _ in range(2)
        )
        state = ParkedState(lambda engine=left: [engine.policy, engine.optimizer], left.device)
        bytes_left, sizes = [], []
        for engine in (stayed, left):
            for _ in range(2):
                train(engine, rows, rank, ranks)
                if engine is left:
                    bytes_left.append(state.leave())
                    sizes.append(
                        sum(p.untyped_storage().nbytes() for p in left.policy.parameters())
                    )
                    assert state.leave() == 0  # it is away
                    state.come_back()
        found[f"{stage}"] = {
            "stayed": stayed.state_dict(),
            "left": left.state_dict(),
            "bytes": bytes_left,
            "sizes": sizes,
            "expected": state_bytes(left) / (ranks if stage else 1),
        }
    return found


def omni_rows(model: Path, *, silent: bool = False) -> list[Row]:
    loader = ArrayLoader()
    encoder = PromptEncoder(model, loader, TemplateConfig())
    prompts = [
        make_prompt(loader, f"av{i}", [] if silent else [video(i, 4, 2.0), audio(i, 1.0)])
        for i in range(3)
    ]
    rng = np.random.default_rng(1)
    return [
        Row(
            (prompts[i // 2].id, False),
            encoder.encode(prompts[i // 2], False),
            rng.integers(30, 400, 6).astype(np.int32),
        )
        for i in range(6)
    ]


def omni(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """An audio-visual policy, float32 with frozen encoders and bfloat16; its export under published
    names."""
    found: dict[str, Any] = {}
    rows = omni_rows(folder / "omni")
    engine = make_engine(folder / "omni", settings(3, freeze=ENCODERS), ranks)
    norms = train(engine, rows, rank, ranks)
    weights = engine.state_dict()
    names_module.PART_BYTES = 1 << 20
    names, sender = NameMap.of(load_model(folder / "omni"), folder / "omni"), None
    assert len(names.parts) > 2
    if rank == 0:
        sender = WeightSender(names.layout, cast("Outbox", None), dtype="float32")
    # Streamed, each part gathered from all ranks.
    publication = Publication(engine, names, sender)
    publication.export(folder / "omni", folder / f"export-{ranks}")
    found["float32"] = {"norms": norms, "weights": weights}
    for stage in STAGES:
        engine = make_engine(folder / "omni", settings(stage, dtype="bfloat16"), ranks, "bfloat16")
        norms = train(engine, rows, rank, ranks)
        found[f"bfloat16-{stage}"] = {"norms": norms, "weights": engine.state_dict()}
    return found


def mixed(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Sight and sound on rank 0, text alone on rank 1: weights after a step."""
    rows = [*omni_rows(folder / "omni")[:2], *omni_rows(folder / "omni", silent=True)[2:4]]
    shares = [[[0, 1], [2, 3]]] if ranks == 1 else [[[0, 1]], [[2, 3]]]
    found: dict[str, Any] = {}
    for stage, freeze in ((0, ()), (1, ()), (2, ()), (3, ()), (1, ENCODERS), (2, ENCODERS)):
        engine = make_engine(folder / "omni", settings(stage, freeze=freeze), ranks)
        batches = [collate([rows[i] for i in indices]) for indices in shares[rank]]
        engine.accumulate(
            batches,
            lambda i, _, output: step_loss(rows, shares[rank][i], output, 0),
            batches[0],
        )
        engine.step(0.01)
        found[f"{stage} frozen" if freeze else f"{stage}"] = engine.state_dict()
    return found


def poisoned(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Weights after a step with a micro-batch whose pixels, and so everything after them, are NaN;
    then without it."""
    rows = omni_rows(folder / "omni")[:4]
    broken = rows[3].prompt.features | {
        "pixel_values_videos": rows[3].prompt.features["pixel_values_videos"] * np.nan
    }
    rows[3] = replace(rows[3], prompt=replace(rows[3].prompt, features=broken))
    found: dict[str, Any] = {}
    for stage in STAGES:
        for number in (3, 2):
            share = [[0], [1], [3]] if ranks == 1 else [[[0]], [[1], [3]]][rank]
            share = share if number == 3 else [indices for indices in share if indices != [3]]
            engine = make_engine(folder / "omni", settings(stage), ranks)
            batches = [collate([rows[i] for i in indices]) for indices in share]

            def loss(i: int, _: MicroBatch, output: PolicyOutput, share: Any = share) -> Tensor:
                return step_loss(rows, share[i], output, 0)

            engine.accumulate(batches, loss, batches[0])
            engine.step(0.01)
            found[f"{stage}-{number}"] = engine.state_dict()
    return found


def spoilt(output: PolicyOutput) -> Tensor:
    """Zero, with a gradient that is not a number."""
    return (output.logprobs.sum() * 0.0).abs().sqrt()


def bad_gradient(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """A good step, a step whose second micro-batch has a finite loss with a NaN gradient, another
    good step."""
    found: dict[str, Any] = {}
    rows = text_rows()
    shares = [[[0], [1]]] if ranks == 1 else [[[0], [1]], [[2], [3]]]
    batches = [collate([rows[i] for i in indices]) for indices in shares[rank]]
    for stage, dtype in [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in STAGES]:
        for spoil in (True, False):
            engine = make_engine(folder / "text", settings(stage, dtype=dtype), ranks, dtype)
            norms, weights, suspects = [], [], []
            for step in range(3):
                if step == 1 and not spoil:
                    continue

                def loss(
                    number: int, _: MicroBatch, output: PolicyOutput, step: int = step
                ) -> Tensor:
                    value = step_loss(rows, shares[rank][number], output, 0)
                    return (
                        value + spoilt(output) if step == 1 and (rank, number) == (0, 1) else value
                    )

                engine.accumulate(batches, loss, batches[0])
                norms.append(engine.step(0.01))
                weights.append(engine.state_dict())
                suspects.append(engine.suspects)
            found[f"{dtype}-{stage}-{spoil}"] = {
                "norms": norms,
                "weights": weights,
                "suspects": suspects,
            }
    return found


#: A rate and an epsilon with which AdamW takes off the gradient itself.
PLAIN = 1e6


def masters(engine: TrainEngine) -> dict[str, Tensor]:
    """The float32 copies that the optimiser works on."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.policy.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        assert whole is not None
        found[name] = whole.clone()
    return found


def sums(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """How far the gradient of 24 packs in bfloat16 is from the float32 sum of their gradients, over
    its largest entry; and the weights of a run that is resumed, and of one that is not."""
    batches = [collate([row]) for row in text_rows() * 4]

    def loss(_: int, __: MicroBatch, output: PolicyOutput) -> Tensor:
        return output.logprobs.sum()

    policy = Policy(load_model(folder / "text", dtype="bfloat16"))
    expected = {name: torch.zeros(p.shape) for name, p in policy.named_parameters()}
    for batch in batches:
        policy.zero_grad()
        loss(0, batch, policy(batch)).backward()
        for name, parameter in policy.named_parameters():
            assert parameter.grad is not None
            expected[name] += parameter.grad.float()
    scale = max(float(value.abs().max()) for value in expected.values())
    found: dict[str, Any] = {}
    for stage, exact in [(stage, exact) for stage in (1, 2, 3) for exact in (False, True)]:
        config = settings(
            stage,
            betas=(0.0, 0.0),
            eps=PLAIN,
            weight_decay=0.0,
            max_grad_norm=1e9,
            dtype="bfloat16",
            accumulate_in_float32=exact,
        )
        engine = make_engine(folder / "text", config, ranks, "bfloat16")
        before = masters(engine)
        engine.accumulate(batches, loss, batches[0])
        norm = engine.step(PLAIN)
        after = masters(engine)
        gaps = [float((before[n] - after[n] - expected[n]).abs().max()) for n in expected]
        found[f"{stage}-{exact}"] = {"gap": max(gaps) / scale, "norm": norm}
        if not exact:
            continue
        write_files(capture(engine, rank), folder / f"sums-{stage}")
        resumed = make_engine(folder / "text", config, ranks, "bfloat16")
        restore(resumed, rank, folder / f"sums-{stage}")
        for one in (engine, resumed):
            one.accumulate(batches[:3], loss, batches[0])
            one.step(PLAIN)
        found[f"{stage}-{exact}"] |= {"through": masters(engine), "resumed": masters(resumed)}
    return found


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    avatar_rl.learner.engine.WHOLE_BELOW = 0  # or ZeRO 3 would split nothing of a tiny model
    scenarios = [parity, checkpoints, parked, omni, mixed, poisoned, bad_gradient]
    if ranks == 1:
        scenarios.append(sums)
    return {scenario.__name__: scenario(folder, rank, ranks) for scenario in scenarios}


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one rank alone and of two together."""
    folder = tmp_path_factory.mktemp("engine")
    build_vision_language(folder / "text", "qwen3")
    build_tiny_omni(folder / "omni")
    for ranks in (1, 2):
        run_ranks("tests.integration.test_learner_engine", folder, ranks)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Norms and weights of plain torch on whole steps, and the weights it started from."""
    model = load_reference(folder / "text")
    policy = Policy(model)
    start = {
        name.removeprefix("model."): p.detach().clone() for name, p in policy.named_parameters()
    }
    config, rows = settings(0), text_rows()
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=config.betas,
        eps=config.eps,
    )
    norms = []
    for step, rate in enumerate(RATES):
        step_loss(rows, range(6), policy(collate(rows)), step).backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return (
        norms,
        {name.removeprefix("model."): p.detach() for name, p in policy.named_parameters()},
        start,
    )


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest absolute difference of any weight."""
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_like_plain_adamw(
    folder: Path, plain: Any, stage: int, ranks: int
) -> None:
    norms, weights, start = plain
    assert min(norms) < 0.5 < max(norms)  # clipped in some steps, not in others
    found = rank_results(folder, "parity", ranks)[str(stage)]
    assert found["norms"] == pytest.approx(norms, rel=1e-4)
    assert difference(weights, start) > 0.5 * max(RATES)
    assert difference(found["weights"], weights) < TOLERANCE * max(RATES)
    assert found["updates"] == 4


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_agree_exactly(folder: Path, stage: int) -> None:
    first, second = (rank_results(folder, "parity", 2, rank)[str(stage)] for rank in (0, 1))
    assert difference(first["weights"], second["weights"]) == 0
    assert torch.equal(first["scores"], second["scores"])
    assert first["norms"] == second["norms"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_of_no_gradient_is_zero(folder: Path, stage: int, ranks: int) -> None:
    assert rank_results(folder, "parity", ranks)[str(stage)]["zero"] == 0.0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_engine_goes_on_as_if_nothing_had_happened(
    folder: Path, stage: int, ranks: int
) -> None:
    found = rank_results(folder, "checkpoints", ranks)[str(stage)]
    assert difference(found["through"], found["resumed"]) == 0
    assert found["updates"] == 3


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_that_left_its_device_trains_on_as_if_it_had_stayed(
    folder: Path, stage: int, ranks: int
) -> None:
    found = rank_results(folder, "parked", ranks)[str(stage)]
    assert difference(found["left"], found["stayed"]) == 0
    assert found["sizes"] == [0, 0]
    # Moments and master copies at least; a rank keeps its share of them from ZeRO 1 on.
    assert min(found["bytes"]) > 0.8 * found["expected"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_names_map_to_the_published_checkpoint(folder: Path, ranks: int) -> None:
    weights = rank_results(folder, "omni", ranks)["float32"]["weights"]
    exported = load_file(folder / f"export-{ranks}" / "model.safetensors")
    assert exported.keys() == checkpoint_names(folder / "omni")
    assert exported.keys() == {f"thinker.{name}" for name in weights}
    assert all(torch.equal(exported[f"thinker.{name}"], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_encoders_keep_their_weights(folder: Path, ranks: int) -> None:
    weights = rank_results(folder, "omni", ranks)["float32"]["weights"]
    start = load_reference(folder / "omni").state_dict()
    moved = {name for name, value in weights.items() if not torch.equal(value, start[name])}
    assert moved and not any("visual" in name or "audio_tower" in name for name in moved)
    assert "lm_head.weight" in moved
    alone = rank_results(folder, "omni", 1)["float32"]
    assert difference(weights, alone["weights"]) < TOLERANCE * max(RATES)


@torch.no_grad()
def test_transformers_loads_the_export_and_computes_the_same(folder: Path) -> None:
    exported = load_reference(folder / "export-1")
    weights = rank_results(folder, "omni", 1)["float32"]["weights"]
    trained = load_reference(folder / "omni")
    row = omni_rows(folder / "omni")[0]
    inputs = {"input_ids": row.prompt.input_ids[None], **row.prompt.features}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["position_ids"] = row.prompt.position_ids[:, None]
    before = trained(**inputs).logits
    trained.load_state_dict(weights, strict=True)
    expected = trained(**inputs).logits
    assert torch.equal(exported(**inputs).logits, expected)
    assert (expected - before).abs().max() > 0.1
    assert (
        json.loads((folder / "export-1" / "config.json").read_text())["model_type"]
        == "qwen2_5_omni"
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_like_float32_within_its_precision(
    folder: Path, stage: int, ranks: int
) -> None:
    """DeepSpeed steps stage 0 in bfloat16 once by itself when it starts: nothing of that may
    show."""
    found = rank_results(folder, "omni", ranks)
    half, whole = found[f"bfloat16-{stage}"], found["float32"]
    assert {value.dtype for value in half["weights"].values()} == {torch.bfloat16}
    start = load_reference(folder / "omni").state_dict()
    moved = difference(half["weights"], {name: start[name] for name in half["weights"]})
    assert 0.5 * max(RATES) < moved < 3 * max(RATES)
    other = rank_results(folder, "omni", 1)["bfloat16-1"]
    assert half["norms"] == pytest.approx(other["norms"], rel=0.01)
    assert half["norms"][0] > whole["norms"][0]  # the encoders are not frozen here
    far = [
        name
        for name, value in half["weights"].items()
        if (value - other["weights"][name]).abs().mean() > 2e-3
    ]
    assert far == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_different_media_train_alike(folder: Path, rank: int) -> None:
    """A rank without media runs the encoders on blank ones wherever the other one waits for it."""
    alone, found = rank_results(folder, "mixed", 1), rank_results(folder, "mixed", 2, rank)
    for name in ("0", "1", "2", "3", "1 frozen", "2 frozen"):
        assert difference(found[name], alone[name]) < TOLERANCE * 0.01


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_micro_batch_of_nan_adds_nothing(folder: Path, stage: int, ranks: int) -> None:
    found = rank_results(folder, "poisoned", ranks)
    assert difference(found[f"{stage}-3"], found[f"{stage}-2"]) == 0
    start = load_reference(folder / "omni").state_dict()
    assert difference(found[f"{stage}-3"], {name: start[name] for name in found["0-2"]}) > 0.005


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_gradient_makes_no_update_and_leaves_no_trace(
    folder: Path, stage: int, ranks: int, dtype: str
) -> None:
    for rank in range(ranks):
        found = rank_results(folder, "bad_gradient", ranks, rank)
        spoilt, clean = found[f"{dtype}-{stage}-True"], found[f"{dtype}-{stage}-False"]
        assert spoilt["norms"][1] == np.inf
        assert spoilt["suspects"] == [[], [1] if rank == 0 else [], []]
        assert difference(spoilt["weights"][1], spoilt["weights"][0]) == 0
        assert [spoilt["norms"][0], spoilt["norms"][2]] == clean["norms"]
        assert difference(spoilt["weights"][2], clean["weights"][1]) == 0
        assert difference(spoilt["weights"][2], spoilt["weights"][1]) > 0.005


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_many_packs_are_added_up_in_float32_where_asked(
    folder: Path, stage: int
) -> None:
    found = rank_results(folder, "sums", 1)
    exact, rounded = found[f"{stage}-True"], found[f"{stage}-False"]
    assert exact["gap"] < 1e-4 < 1e-3 < rounded["gap"]  # ``PLAIN`` itself costs 2e-5
    assert exact["norm"] == pytest.approx(rounded["norm"], rel=0.02)
    assert difference(exact["through"], exact["resumed"]) == 0


if __name__ == "__main__":
    rank_main(work)
