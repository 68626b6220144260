"""LoRA against PEFT's own model and plain AdamW: every ZeRO stage, one and two ranks; what a
checkpoint holds; and what is exported and merged.

Ranks are processes of this module (`tests.ranks`); they write what they got and the tests compare.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor

import avatar_rl.learner.engine
from avatar_rl.common.errors import ConfigError, ModelError
from avatar_rl.common.weight_files import WeightFiles
from avatar_rl.learner.adapter.base import BaseRecord
from avatar_rl.learner.adapter.files import AdapterFolder, export_adapter, merge_adapter
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.batch.microbatch import Pending, Row, collate
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.model.export import export_checkpoint
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.names import NameMap
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.model.reference import JointReference
from avatar_rl.learner.state import StateReplicator, capture, restore, state_bytes
from avatar_rl.learner.state_replica import write_files
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.integration.test_learner_engine import (
    RATES,
    TOLERANCE,
    difference,
    settings,
    step_loss,
    text_rows,
    train,
)
from tests.integration.test_zero3 import rows_of
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_models import build_vision_language, load_reference, logits_of

pytestmark = pytest.mark.timeout(600)
STAGES = (0, 1, 2, 3)
LORA = LoraConfig(rank=4, alpha=16, targets=("llm",))
EVERYWHERE = LoraConfig(rank=8, alpha=32, targets=("all-linear",))


def make_engine(
    model: Path, stage: int, ranks: int, lora: LoraConfig = LORA, dtype: str = "float32"
) -> TrainEngine:
    loaded = load_model(model, dtype=dtype)
    adapter = Adapter.attach(loaded, lora, seed=1)
    config = settings(stage, dtype=dtype, weight_decay=0.0)
    return TrainEngine(
        Policy(loaded).eval(), config, world_size=ranks, dtype=dtype, adapter=adapter
    )


def batch_of(rows: list[Row]) -> Pending:
    return Pending(rows)


# -- what a rank does ------------------------------------------------------------------------------


def training(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Adapter and merged weights of three steps by every stage; the same again from a state saved
    half-way; the policy's own and its base's scores."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        engine = make_engine(folder / "text", stage, ranks)
        start = engine.adapter_state()
        norms = train(engine, text_rows(), rank, ranks)
        after = engine.adapter_state()
        saved = folder / f"state-{ranks}-{stage}"
        files = capture(engine, rank)
        write_files(files, saved)
        torch.distributed.barrier()
        resumed = make_engine(folder / "text", stage, ranks)
        restore(resumed, rank, saved)
        train(engine, text_rows(), rank, ranks)
        train(resumed, text_rows(), rank, ranks)
        found[f"{stage}"] = {
            "start": start,
            "norms": norms,
            "after": after,
            "merged": engine.state_dict(),
            "through": engine.adapter_state(),
            "resumed": resumed.adapter_state(),
            "bytes": sum(content.nbytes for content in files.values()),
            "bound": state_bytes(engine),
            "scores": engine.score(batch_of(text_rows()).collate()).logprobs,
            "reference": references(engine, rank, ranks),
        }
    return found


def references(engine: TrainEngine, rank: int, ranks: int) -> list[Tensor]:
    """The base's log-probabilities of this rank's rows, asked for in unequally many micro-batches,
    and once more from the cache."""
    rows = text_rows()
    mine = rows[: 5 if ranks == 1 or rank == 0 else 1]
    ids = [[f"{rank}-{number}"] for number in range(len(mine))]
    plan = [batch_of([row]) for row in mine]
    calls = []

    def score_base(*arguments: Any) -> Any:
        for number, output in engine.score_base(*arguments):
            calls.append(number)
            yield number, output

    reference = JointReference(score_base, device=engine.device, cached=2)
    found = []
    for _ in range(2):
        reference.prepare(ids, plan, plan[0])
        found += [
            reference.logprobs(some, batch.rows) for some, batch in zip(ids, plan, strict=True)
        ]
    assert len(calls) == len(mine)
    return found


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    avatar_rl.learner.engine.WHOLE_BELOW = 0
    return {"training": training(folder, rank, ranks)}


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    build_vision_language(folder / "text", "qwen3")
    build_tiny_omni(folder / "omni")
    for ranks in (1, 2):
        run_ranks(MODULE, folder, ranks)
    return folder


MODULE = "tests.integration.test_lora"


def peft_model(base: Path, adapter: Adapter, tensors: dict[str, Tensor] | None = None) -> Any:
    """PEFT's own model with the settings of ``adapter`` and its values, or ``tensors``."""
    plain = peft.LoraConfig(
        r=adapter.config.rank,
        lora_alpha=adapter.config.alpha,
        target_modules=sorted(adapter.layers),
        use_rslora=adapter.config.rslora,
    )
    model = peft.get_peft_model(load_reference(base), plain)
    values = tensors or {
        f"{name}.lora_{side}.weight": getattr(layer, f"lora_{side}")["default"].weight
        for name, layer in adapter.layers.items()
        for side in "AB"
    }
    state = {f"base_model.model.{name}": value.detach() for name, value in values.items()}
    report = peft.set_peft_model_state_dict(model, state)
    assert not report.unexpected_keys
    return model.eval()


def full_logprobs(model: Any, row: Row) -> Tensor:
    """(T,) with gradients, from one whole forward."""
    logits = logits_of.__wrapped__(model, row.prompt, row.token_ids)
    return torch.log_softmax(logits, -1).gather(1, torch.from_numpy(row.token_ids).long()[:, None])[
        :, 0
    ]


def shaken(adapter: Adapter) -> None:
    """B is zero at first, and then A has no gradient."""
    torch.manual_seed(3)
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)


@pytest.mark.parametrize("lora", [LORA, EVERYWHERE, EVERYWHERE.model_copy(update={"rslora": True})])
def test_gradients_are_those_of_pefts_own_model(folder: Path, lora: LoraConfig) -> None:
    rows = rows_of(folder / "omni", "video+audio", "image", "audio", "")
    model = load_model(folder / "omni")
    adapter = Adapter.attach(model, lora)
    shaken(adapter)
    other = peft_model(folder / "omni", adapter)
    policy = Policy(model).eval()
    assert adapter.freeze_base(policy) == sum(
        p.numel() for p in other.parameters() if p.requires_grad
    )
    weights = torch.tensor([1.0, -0.7, 0.4, -1.3])
    (weights[:, None] * policy(batch_of(rows).collate()).logprobs).sum().backward()
    sum(
        weight * full_logprobs(other, row).sum() for weight, row in zip(weights, rows, strict=True)
    ).backward()  # type: ignore[union-attr]
    expected = {n: p.grad for n, p in other.named_parameters() if p.requires_grad}
    found = {
        f"base_model.model.{n.removeprefix('model.')}": p.grad
        for n, p in policy.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == expected.keys() and len(found) == 2 * len(adapter.layers)
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        assert gradient is not None and found[name] is not None
        assert float((found[name] - gradient).abs().max()) < 2e-5 * largest, name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_like_peft_under_plain_adamw(
    folder: Path, stage: int, ranks: int
) -> None:
    found = rank_results(folder, "training", ranks)[str(stage)]
    model = load_model(folder / "text")
    adapter = Adapter.attach(model, LORA, seed=1)
    other = peft_model(folder / "text", adapter, found["start"])
    policy = Policy(other.base_model.model).eval()
    trained = [p for p in policy.parameters() if p.requires_grad]
    config = settings(stage)
    optimizer = torch.optim.AdamW(
        trained, lr=1.0, betas=config.betas, eps=config.eps, weight_decay=0.0
    )
    norms, rows = [], text_rows()
    for step, rate in enumerate(RATES):
        step_loss(rows, range(6), policy(collate(rows)), step).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    expected = {
        name.removeprefix("model.").replace(".default.", "."): p.detach()
        for name, p in policy.named_parameters()
        if p.requires_grad
    }
    assert found["norms"] == pytest.approx(norms, rel=1e-3)
    assert difference(found["after"], found["start"]) > 0.5 * max(RATES)
    # Three times what whole weights may differ: the gradients of A begin at 0, since B does.
    assert difference(found["after"], expected) < 3 * TOLERANCE * max(RATES)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_state_holds_the_adapter_alone_and_resumes(
    folder: Path, stage: int, ranks: int
) -> None:
    found = rank_results(folder, "training", ranks)[str(stage)]
    assert difference(found["through"], found["resumed"]) == 0
    adapter = sum(tensor.numel() for tensor in found["after"].values())
    model = sum(tensor.numel() for tensor in found["merged"].values())
    assert found["bound"] == adapter * (4 + 12) < 4 * model
    # Four copies in float32, and DeepSpeed's counters and names.
    assert found["bytes"] < 16 * adapter + 300_000 + 0.1 * 4 * model


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_is_the_base_and_ranks_agree(folder: Path, stage: int, ranks: int) -> None:
    base = Policy(load_model(folder / "text")).eval()
    for rank in range(ranks):
        found = rank_results(folder, "training", ranks, rank)[str(stage)]
        rows = text_rows()[: 5 if ranks == 1 or rank == 0 else 1]
        assert len(found["reference"]) == 2 * len(rows)
        for row, scores in zip(rows * 2, found["reference"], strict=True):
            with torch.no_grad():
                expected = base(batch_of([row]).collate()).logprobs
            assert torch.allclose(scores, expected, atol=1e-5)
        first = rank_results(folder, "training", ranks, 0)[str(stage)]
        assert difference(found["through"], first["through"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_merged_weights_score_like_the_adapter(folder: Path, stage: int) -> None:
    found = rank_results(folder, "training", 1)[str(stage)]
    model = load_model(folder / "text")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert found["merged"].keys() == start.keys()
    moved = {name for name in start if not torch.equal(start[name], found["merged"][name])}
    assert moved == {
        name.replace(".lora_A.weight", ".weight") for name in found["after"] if "lora_A" in name
    }
    model.load_state_dict(found["merged"])
    with torch.no_grad():
        scores = Policy(model).eval()(batch_of(text_rows()).collate()).logprobs
    assert torch.allclose(scores, found["scores"], atol=1e-5)


def exported(base: Path, out: Path, dtype: str = "float32") -> tuple[Any, Adapter, Path]:
    """A policy with a shaken adapter, exported as a rank does: merged, and the adapter in it."""
    model = load_model(base, dtype=dtype)
    names = NameMap.of(model, base)
    adapter = Adapter.attach(model, EVERYWHERE)
    shaken(adapter)
    weights = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    merged = adapter.merged(weights)
    parts = ({name: merged[name] for name in part} for part in names.parts)
    export_checkpoint(names.publish(parts), base, out)
    record = BaseRecord.of(base, EVERYWHERE)
    export_adapter(adapter.tensors(weights), adapter.settings, record, out / "adapter")
    return model, adapter, out


@pytest.mark.parametrize("kind", ["qwen2_5_omni", "qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_exports_give_the_trained_logits(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny_omni(base) if kind == "qwen2_5_omni" else build_vision_language(base, kind)
    model, _, out = exported(base, tmp_path / "out")
    [row] = rows_of(base, "" if kind == "qwen3" else "image")
    row = replace(row, token_ids=row.token_ids % 250)  # of the smallest vocabulary
    expected = logits_of(model.eval(), row.prompt, row.token_ids)
    loaded = peft.PeftModel.from_pretrained(load_reference(base), out / "adapter").eval()
    before = logits_of(load_reference(base), row.prompt, row.token_ids)
    assert float((expected - before).abs().max()) > 1e-2
    assert torch.allclose(logits_of(loaded, row.prompt, row.token_ids), expected, atol=1e-5)
    merged = logits_of(load_reference(out), row.prompt, row.token_ids)
    assert torch.allclose(merged, expected, atol=1e-4)
    # ``model.path: ADAPTER``: the same bytes once more, from the two folders alone.
    again = merge_adapter(AdapterFolder.open(out / "adapter"), base, tmp_path / "again")
    left, right = WeightFiles.find(out), WeightFiles.find(again)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert left.tensors.keys() == right.tensors.keys()
    assert AdapterFolder.open(out / "adapter").base(None) == base.resolve()


def test_an_adapter_of_pefts_own_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    base = build_vision_language(tmp_path / "base", "qwen3")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 32},
        use_rslora=True,
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(load_reference(base), settings)
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    out = merge_adapter(AdapterFolder.open(tmp_path / "adapter"), base, tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    found = load_reference(out).state_dict()
    assert max(float((found[n] - expected[n]).abs().max()) for n in expected) < 1e-6


def test_bfloat16_is_merged_with_one_rounding(folder: Path) -> None:
    model = load_model(folder / "omni", dtype="bfloat16")
    adapter = Adapter.attach(model, EVERYWHERE)
    shaken(adapter)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    before = {name: weight.clone() for name, weight in weights.items()}
    merged = adapter.merged(weights)
    for name in adapter.layers:
        base, a, b = (
            before[f"{name}.{part}.weight"].double()
            for part in ("base_layer", "lora_A.default", "lora_B.default")
        )
        exact = base + EVERYWHERE.scaling * b @ a
        step = (exact.abs() * 2**-8).clamp(min=1e-9)  # half a unit in the last place, and slack
        assert bool(((merged[f"{name}.weight"].double() - exact).abs() <= step).all())
        assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert all(torch.equal(before[name], weights[name]) for name in before)


def test_dropout_is_for_training_passes_alone(folder: Path) -> None:
    model = load_model(folder / "text")
    adapter = Adapter.attach(model, LORA.model_copy(update={"dropout": 0.5}))
    shaken(adapter)
    policy, batch = Policy(model).eval(), batch_of(text_rows()).collate()
    with torch.no_grad():
        quiet = policy(batch).logprobs
        assert torch.equal(policy(batch).logprobs, quiet)
        adapter.drop(active=True)
        assert not torch.equal(policy(batch).logprobs, quiet)
        adapter.drop(active=False)
        with adapter.off():
            base = policy(batch).logprobs
        assert not torch.equal(base, quiet) and torch.equal(policy(batch).logprobs, quiet)


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    _, _, out = exported(folder / "text", tmp_path / "out")
    adapter = AdapterFolder.open(out / "adapter")
    with pytest.raises(ModelError, match="an adapter of another base: it was trained on"):
        adapter.base(folder / "omni")
    with pytest.raises(ModelError, match="of another base: it adapts 'model"):
        merge_adapter(adapter, build_wide(tmp_path / "wide", layers=1), tmp_path / "merged")
    with pytest.raises(ModelError, match=r"is of another base: its layer .* makes \(64, \d+\)"):
        merge_adapter(adapter, build_wide(tmp_path / "wider", layers=2), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def build_wide(out: Path, layers: int) -> Path:
    """A text model of another width or depth."""
    import transformers as hf

    config = copy.deepcopy(hf.AutoConfig.from_pretrained(out.parent / "out"))
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    config.hidden_size = 64 if layers == 1 else 96
    hf.Qwen3ForCausalLM(config).save_pretrained(out)
    return out


def test_a_state_of_another_base_or_of_a_whole_model_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    ours = BaseRecord.of(folder / "text", LORA)
    state = folder / "state-1-0"
    (tmp_path / "state").mkdir()
    with pytest.raises(ModelError, match=r"state of a whole model, but learner\.lora is set"):
        StateReplicator(None, 0, None, max_bytes=0, base=ours).restore(state)  # type: ignore[arg-type]
    for other, said in (
        (BaseRecord.of(folder / "omni", LORA), "holds an adapter of another base"),
        (BaseRecord.of(folder / "text", EVERYWHERE), "was trained with learner.lora"),
        (BaseRecord.of(folder / "text", None), "was trained with learner.lora"),
    ):
        (tmp_path / "state" / "avatar_base.json").write_bytes(other.content())
        with pytest.raises(ModelError, match=said):
            StateReplicator(None, 0, None, max_bytes=0, base=ours).restore(tmp_path)  # type: ignore[arg-type]


def test_targets_that_cannot_be_adapted_are_refused(folder: Path) -> None:
    model = load_model(folder / "omni")
    for lora, said in (
        (LoraConfig(targets=("gate",)), r"'gate' matches no linear layer.*vision \(.*down_proj"),
        (LoraConfig(rank=65, targets=("vision",)), "rank 65 is above the width of"),
    ):
        with pytest.raises(ConfigError, match=said):
            Adapter.attach(model, lora)
    text = load_model(folder / "text")
    with pytest.raises(ConfigError, match=r"'audio' matches no linear layer.*the parts llm \(14\)"):
        Adapter.attach(text, LoraConfig(targets=("llm", "audio")))
    assert np.all([p.requires_grad for p in text.parameters()])  # left as it was


if __name__ == "__main__":
    rank_main(work)
