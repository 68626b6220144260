"""Ranks that share packs train as one: log-probabilities, losses and every gradient, and whole
steps under every ZeRO stage.

Ranks are processes of this module (`tests.ranks`); they compare what they share with what each
computes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import avatar_rl.learner.engine
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.batch.microbatch import MicroBatch, Row, collate
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.media.ahead import AheadEncoder
from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.towers import Towers
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.learner.model.policy import Policy, PolicyOutput, Replay
from avatar_rl.learner.model.reference import ReferencePolicy
from avatar_rl.learner.model.router import Routers
from avatar_rl.learner.model.sequence import SequenceGroup
from avatar_rl.learner.objective.step_metrics import StepMetrics
from avatar_rl.learner.state import StateReplicator
from avatar_rl.learner.step import StepTrainer
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.embeddings.names import TOWERS
from avatar_rl.prompts.embeddings.store import EmbeddingStore
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from benchmarks.learner_side import make_spec, make_step
from tests.integration.test_embedding_steps import prompts_of
from tests.integration.test_learner_engine import settings
from tests.integration.test_zero3 import rows_of
from tests.ranks import rank_main, rank_results, run_ranks
from tests.tiny_families import EXPERTS, FAMILIES
from tests.tiny_models import ArrayLoader, build_vision_language

pytestmark = pytest.mark.timeout(600)
MODULE = "tests.integration.test_sequence_parallel"
RANKS = 4
#: ZeRO stages by the number of ranks that share a pack, of four.
SHARED = {2: (0, 1, 2, 3), 4: (3,)}
#: Model, media of its prompts, and what else is switched on.
KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "omni": ("qwen2_5_omni", ("video+audio", "image", ""), ()),
    "omni checkpointed": ("qwen2_5_omni", ("video+audio", ""), ("checkpointed",)),
    "omni with an adapter": ("qwen2_5_omni", ("video",), ("lora", "checkpointed")),
    "deepstack": ("qwen3_vl", ("image", "video"), ()),
    "experts": ("qwen3_vl_moe", ("video", ""), ("checkpointed",)),
    "replayed experts": ("qwen3_vl_moe", ("video", ""), ("checkpointed", "replayed")),
    "text, a wrapped head": ("qwen3", ("", ""), ("wrapped",)),
    "sliding windows, a tied head": ("gemma3", ("", ""), ()),
}
LENGTHS = (5, 1, 9)
#: A rate and an epsilon with which AdamW takes off the gradient itself.
PLAIN = 1e6


def completed(rows: Sequence[Row]) -> list[Row]:
    """Three completions of each row's prompt, mixed up."""
    rng = np.random.default_rng(5)
    return [
        replace(row, token_ids=rng.integers(30, 250, length).astype(np.int32))
        for length in LENGTHS
        for row in rows
    ]


def text_prompts(lengths: Sequence[int]) -> list[Row]:
    return [
        Row(
            (f"t{n}", False),
            EncodedPrompt(torch.arange(40, 40 + n), torch.arange(n)[None], n),
            np.arange(3, dtype=np.int32),
        )
        for n in lengths
    ]


def rows_for(model: Path, kind: str, media: Sequence[str]) -> list[Row]:
    if kind in ("qwen3", "gemma3"):
        return completed(text_prompts([70, 7]))
    return completed(rows_of(model, *media))


def with_experts(rows: Sequence[Row]) -> list[Row]:
    """Two experts of each token and layer, drawn; the first row has none."""
    rng, shape = np.random.default_rng(6), (EXPERTS["num_hidden_layers"], EXPERTS["num_experts"])
    drawn = [rng.random((len(row.token_ids) - 1, *shape)).argsort(-1)[..., :2] for row in rows]
    given = [replace(row, experts=d.astype(np.uint8)) for row, d in zip(rows, drawn, strict=True)]
    return [rows[0], *given[1:]]


def weighted(output: PolicyOutput, rows: Sequence[int]) -> Tensor:
    """A loss whose gradients are of the order of 1."""
    weights = torch.tensor([(1.0, -0.7, 0.4, -1.3, 0.6, 0.2)[i % 6] for i in rows])
    return 0.1 * (weights[:, None] * output.logprobs).sum() / len(rows)


def gradients(
    model: nn.Module, batch: MicroBatch, group: SequenceGroup | None, replay: Replay | None = None
) -> dict[str, Any]:
    """Of one pack, summed over the ranks that share it."""
    policy = Policy(model, group, replay)
    policy.zero_grad()
    output = policy(batch)
    loss = weighted(output, range(len(batch.mask)))
    loss.backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in policy.named_parameters()
        if p.requires_grad
    }
    if group is not None:
        found = {name: group.added(gradient) for name, gradient in found.items()}
    policy.release()
    return {"loss": loss.detach(), "output": output, "gradients": found}


# -- what a rank does ------------------------------------------------------------------------------


def equal_gradients(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Largest differences between a pack that two ranks share and the same pack alone. Each pair of
    ranks tries every other kind."""
    group = SequenceGroup(2, rank=rank, ranks=ranks)
    found: dict[str, Any] = {}
    for name in [*KINDS][rank // 2 :: 2]:
        kind, media, options = KINDS[name]
        model = load_model(folder / kind)
        if "lora" in options:
            adapter = Adapter.attach(model, LoraConfig(rank=4, alpha=16, targets=("llm",)), seed=1)
            torch.manual_seed(0)
            for layer in adapter.layers.values():  # B is zero at first, and A's gradient with it
                nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
            adapter.freeze_base(model)
        if "checkpointed" in options:
            recompute_activations(model)
        if "wrapped" in options:
            model.lm_head = nn.Sequential(model.lm_head)
        rows, replay = rows_for(folder / kind, kind, media), None
        if "replayed" in options:
            rows, replay = with_experts(rows), Routers(model, "replay", 0.0).replay
        found[name] = compared(model, collate(rows), group, replay)
    # A pack of fewer positions than ranks.
    short = [replace(row, token_ids=row.token_ids[:1]) for row in text_prompts([1])]
    found["one position"] = compared(load_model(folder / "qwen3"), collate(short), group)
    return found


def compared(
    model: nn.Module, batch: MicroBatch, group: SequenceGroup, replay: Replay | None = None
) -> dict[str, float]:
    alone = gradients(model, batch, None, replay)
    shared = gradients(model, batch, group, replay)
    assert alone["gradients"].keys() == shared["gradients"].keys()
    scale = max(float(g.abs().max()) for g in alone["gradients"].values())
    return {
        "loss": float((alone["loss"] - shared["loss"]).abs()),
        "scores": max(
            float((one - other).abs().max())
            for one, other in zip(alone["output"], shared["output"], strict=True)
        ),
        "gradient": max(
            float((alone["gradients"][name] - value).abs().max())
            for name, value in shared["gradients"].items()
        )
        / scale,
        "scale": scale,
    }


def updates(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """By every ZeRO stage and size of the groups: the gradient that an update has taken off,
    against that of one process, whose loss is the sum over the packs."""
    rows = completed(rows_of(folder / "qwen2_5_omni", "video+audio", "", "image"))
    packs = [[0, 1, 3], [4], [2, 5, 6, 7, 8]]
    loaded = load_model(folder / "qwen2_5_omni")
    policy = Policy(copy.deepcopy(loaded))
    for pack in packs:
        weighted(policy(collate([rows[i] for i in pack])), pack).backward()
    expected = {n.removeprefix("model."): p.grad for n, p in policy.named_parameters()}
    found: dict[str, Any] = {}
    for size, stages in SHARED.items():
        for stage in stages:
            group = SequenceGroup(size, rank=rank, ranks=ranks)
            config = settings(
                stage, betas=(0.0, 0.0), eps=PLAIN, weight_decay=0.0, max_grad_norm=1e9
            )
            model = copy.deepcopy(loaded)
            recompute_activations(model)
            engine = TrainEngine(Policy(model, group), config, world_size=ranks, dtype="float32")
            before = engine.state_dict()
            # Groups of ranks have unequally many packs.
            share = packs if size == ranks else (packs[:2], packs[2:])[rank // size]
            batches = [collate([rows[i] for i in pack]) for pack in share]

            def loss(i: int, _: MicroBatch, output: PolicyOutput, share: Any = share) -> Tensor:
                return weighted(output, share[i])

            engine.accumulate(batches, loss, batches[0])
            norm = engine.step(PLAIN)
            after = engine.state_dict()
            gaps = {
                name: float(((before[name] - after[name]) - gradient).abs().max())
                for name, gradient in expected.items()
                if gradient is not None
            }
            worst = max(gaps, key=lambda name: gaps[name])
            squares = [g.double().square().sum() for g in expected.values() if g is not None]
            found[f"{size}-{stage}"] = {
                "gap": gaps[worst],
                "scale": max(float(g.abs().max()) for g in expected.values() if g is not None),
                "worst": worst,
                "norm": norm,
                "expected": float(torch.stack(squares).sum().sqrt()),
            }
    return found


def steps(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Two whole steps with replays, KL and a ratio per sequence on stored embeddings: packs that
    ranks share, and packs of their own."""
    found: dict[str, Any] = {}
    model = folder / "qwen2_5_omni"
    for size in (2, 1):
        loader = ArrayLoader()
        prompts = prompts_of(loader)
        plain = PromptEncoder(model, loader, TemplateConfig())

        def towers() -> Towers:
            return Towers(model, dtype="float32", device=torch.device("cpu"))

        stored = StoredEncoder(plain, EmbeddingStore(folder / "store", 1 << 28), "r", towers)
        config = LearnerConfig(
            ranks=ranks,
            sequence_parallel=size,
            objective=ObjectiveConfig(ratio="sequence", mismatch="none"),
            optimizer=OptimizerConfig(freeze=TOWERS, zero_stage=2, eps=1e-3, dtype="float32"),
            micro_batch_tokens=1024,
        )
        spec = make_spec(model, model, config)
        group = SequenceGroup(size, rank=rank, ranks=ranks) if size > 1 else None
        engine = TrainEngine(
            Policy(load_model(model), group).eval(),
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
            AheadEncoder(stored, None),
            StateReplicator(engine, rank, None, max_bytes=0),
            reference=ReferencePolicy(
                model, dtype="float32", device=engine.device, cached=1000, sequence=group
            ),
        )
        encoded = {p.id: plain.encode(p, False) for p in prompts}
        norms, metrics = [], []
        for number in range(2):
            rng = np.random.default_rng(number)
            work = make_step(number, encoded, rng, shortest=3, longest=9, tokens=(30, 400))
            *fresh, old = work.groups
            work = replace(
                work, groups=tuple(fresh), replays=old.trajectories, baselines=(0.5,) * 8
            )
            gathered = StepMetrics()
            trainer.forward_backward(trainer.plan(work), gathered)
            norms.append(engine.step(1e-3))
            metrics.append(trainer._gather(gathered).metrics())
        found[f"{size}"] = {"norms": norms, "metrics": metrics, "weights": engine.state_dict()}
    return found


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    avatar_rl.learner.engine.WHOLE_BELOW = 0
    scenarios = (equal_gradients, updates, steps)
    return {scenario.__name__: scenario(folder, rank, ranks) for scenario in scenarios}


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of four ranks, in pairs and all on one pack."""
    folder = tmp_path_factory.mktemp("sequence")
    for kind in {kind for kind, _, _ in KINDS.values()}:
        if kind in FAMILIES:
            FAMILIES[kind](folder / kind)
        else:
            build_vision_language(folder / kind, kind)
    run_ranks(MODULE, folder, RANKS)
    return folder


@pytest.mark.parametrize("name", [*KINDS, "one position"])
def test_two_ranks_that_share_a_pack_have_the_gradients_of_one(folder: Path, name: str) -> None:
    results = [rank_results(folder, "equal_gradients", RANKS, rank) for rank in range(RANKS)]
    tried = [found[name] for found in results if name in found]
    assert len(tried) >= 2
    for found in tried:
        assert found["loss"] <= 1e-5 and found["scores"] <= 1e-5
        assert found["gradient"] <= 1e-5
        assert found["scale"] > 1e-3


@pytest.mark.parametrize(
    ("size", "stage"), [(size, stage) for size, stages in SHARED.items() for stage in stages]
)
def test_an_update_takes_off_the_gradient_of_one_process(
    folder: Path, size: int, stage: int
) -> None:
    """Groups with unequally many packs; four ranks on one pack repeat the two heads of keys and
    values."""
    for rank in range(RANKS):
        found = rank_results(folder, "updates", RANKS, rank)[f"{size}-{stage}"]
        assert found["gap"] <= 1e-5 * found["scale"], found
        assert found["norm"] == pytest.approx(found["expected"], rel=1e-3)


def test_steps_on_shared_packs_are_the_steps_of_ranks_with_packs_of_their_own(
    folder: Path,
) -> None:
    for rank in range(RANKS):
        found = rank_results(folder, "steps", RANKS, rank)
        shared, own = found["2"], found["1"]
        assert shared["norms"] == pytest.approx(own["norms"], rel=1e-4)
        gap = max(float((shared["weights"][n] - w).abs().max()) for n, w in own["weights"].items())
        assert gap <= 1e-5
        for one, other in zip(shared["metrics"], own["metrics"], strict=True):
            assert one.keys() == other.keys()
            for name, value in other.items():
                if name in ("tokens/computed", "tokens/pairs"):
                    continue  # four ranks compute a prompt more than once where that is sooner done
                assert one[name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name


if __name__ == "__main__":
    rank_main(work)
