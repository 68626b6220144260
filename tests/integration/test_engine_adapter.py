"""Adapters as versions in a rollout engine on a tiny Omni, against merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest, GeneratedCompletion, RolloutEngine
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.adapter.lora import merge
from avatar_rl.prompts.encoding.template import PromptEncoder, TemplateConfig
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from benchmarks.gpu_blocks.transfer import random_adapter, swaps
from tests.integration.test_engine import CONFIG, drain, tokens
from tests.tiny_models import ArrayLoader, audio, image, make_prompt, respawn, video

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = AdapterShape(rank=6, alpha=12.0, rslora=False, layers=LAYERS)
VERSIONS = 3
GREEDY = RequestSampling(temperature=0, max_tokens=24, ignore_eos=True)


def adapter(weights: dict[str, Tensor], seed: int, prefix: str) -> dict[str, Tensor]:
    """A random adapter on every linear layer below ``prefix``, as the learner publishes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        if name.startswith(prefix) and name.endswith("proj.weight"):
            layer, (rows, columns) = name.removesuffix(".weight"), weight.shape
            tensors[f"{layer}.lora_A.weight"] = 0.1 * torch.randn(
                SHAPE.rank, columns, generator=generator
            )
            tensors[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(
                rows, SHAPE.rank, generator=generator
            )
    return tensors


def merged(weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = dict(weights)
    for name, tensor in tensors.items():
        if ".lora_A" in name:
            layer = name.removesuffix(".lora_A.weight")
            b = tensors[f"{layer}.lora_B.weight"]
            scaling = SHAPE.alpha / SHAPE.rank
            whole[f"{layer}.weight"] = merge(weights[f"{layer}.weight"], tensor, b, scaling)
    return whole


class Stage:
    """An engine that takes adapters, and what an engine says that takes merged weights."""

    def __init__(self, folder: Path) -> None:
        base = build_tiny_omni(folder / "base")
        respawn(base, folder / "model", 0)
        self.folder = folder / "model"
        self.weights = load_file(self.folder / "model.safetensors")
        self.adapters = [adapter(self.weights, seed, "thinker.model.") for seed in range(VERSIONS)]
        loader = ArrayLoader()
        self.encoder = PromptEncoder(self.folder, loader, TemplateConfig())
        self.prompts = [
            make_prompt(loader, "text", []),
            make_prompt(loader, "image", [image(1)]),
            make_prompt(loader, "long", [], question="how many red squares are there " * 20),
            make_prompt(loader, "both", [video(2, 4, 2.0), audio(3, 1.5)]),
        ]
        other = RolloutEngine(self.folder, CONFIG)
        self.expected = [self.run(other, GREEDY)]  # by version, 0 is the base
        for version, tensors in enumerate(self.adapters, 1):
            other.adopt(version, merged(self.weights, tensors).items())
            self.expected.append(self.run(other, GREEDY))
        other.close()
        self.engine = RolloutEngine(self.folder, CONFIG, adapter=SHAPE)

    def submit(self, engine: RolloutEngine, sampling: RequestSampling, name: str = "") -> None:
        for prompt in self.prompts:
            engine_input = self.encoder.engine_input(prompt, False)
            engine.submit(name + prompt.id, engine_input, sampling, seed=1)

    def run(self, engine: RolloutEngine, sampling: RequestSampling) -> dict[str, FinishedRequest]:
        self.submit(engine, sampling)
        return drain(engine)

    def adopt(self, version: int) -> None:
        self.engine.adopt(version, self.adapters[version - 1].items())


def same_but_for_ties(found: GeneratedCompletion, right: GeneratedCompletion) -> None:
    """Greedy tokens are equal up to a place where two are equally likely: another batch rounds in
    another way."""
    differ = np.flatnonzero(found.token_ids != right.token_ids)
    end = differ[0] if len(differ) else len(right.token_ids)
    np.testing.assert_allclose(found.logprobs[:end], right.logprobs[:end], atol=1e-5)
    if len(differ):
        assert abs(found.logprobs[end] - right.logprobs[end]) < 2e-5


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("adapters"))
    yield stage
    stage.engine.close()


def test_adapters_are_versions(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, since versions only grow: adopted while others run, four at a time."""

    def no_reset(*_: object, **__: object) -> None:
        raise AssertionError("nothing is prefilled again")

    engine = stage.engine
    for name in ("reset_prefix_cache", "reset_encoder_cache"):
        monkeypatch.setattr(engine._engine, name, no_reset)
    for version in range(VERSIONS + 1):
        if version:
            assert engine.can_adopt and engine.adopts_free
            stage.adopt(version)
            assert engine.version == version
        stage.submit(engine, GREEDY, f"{version}-")
        for _ in range(3):  # all of them are under way when the next version comes
            assert engine.step() == []
    finished = drain(engine)
    for version, expected in enumerate(stage.expected):
        for prompt in stage.prompts:
            [found] = finished[f"{version}-{prompt.id}"].completions
            [right] = expected[prompt.id].completions
            assert found.versions == ((version, len(found.token_ids)),)
            assert found.token_ids.tolist() == right.token_ids.tolist()
            np.testing.assert_allclose(found.logprobs, right.logprobs, atol=1e-5)
    assert len({str(tokens(expected)) for expected in stage.expected}) == VERSIONS + 1

    # The prefix cache tells versions apart: the same prompts again, on the newest.
    again = stage.run(engine, GREEDY)
    assert tokens(again) == tokens(stage.expected[VERSIONS])

    # More versions than there is room for at once: the next ones wait for a place.
    first = VERSIONS + 1
    for version in range(first, first + 6):
        engine.adopt(version, stage.adapters[version % VERSIONS].items())
        stage.submit(engine, GREEDY, f"{version}-")
        engine.step()
    finished = drain(engine)
    for version in range(first, first + 6):
        for prompt in stage.prompts:
            [found] = finished[f"{version}-{prompt.id}"].completions
            [right] = stage.expected[version % VERSIONS + 1][prompt.id].completions
            assert found.versions[0][0] == version
            same_but_for_ties(found, right)
    held = engine._engine.collective_rpc(lambda worker: sorted(worker._adapters))
    assert held == [[*range(first, first + 6)]]  # those in flight when the last came

    newest = engine.version
    for broken, said in (
        (adapter(stage.weights, 0, "thinker.audio_tower."), "no place for|layers, the version"),
        ({}, "has 0 layers"),
        (dict(list(stage.adapters[0].items())[1:]), "is None"),
        ({name: tensor * float("nan") for name, tensor in stage.adapters[0].items()}, "NaN"),
        ({name: tensor.T for name, tensor in stage.adapters[0].items()}, "is due"),
    ):
        with pytest.raises(ModelError, match=said):
            engine.adopt(newest + 1, broken.items())
        assert engine.version == newest
    assert tokens(stage.run(engine, GREEDY)) == tokens(stage.expected[newest % VERSIONS + 1])


def test_a_layer_that_vllm_does_not_adapt_is_refused(stage: Stage) -> None:
    tower = adapter(stage.weights, 0, "thinker.audio_tower.")
    assert tower and stage.engine._adapters is not None
    with pytest.raises(ModelError, match=r"no place for \d+ layers .*rollout\.lora to merged"):
        stage.engine._adapters.take(stage.engine.version + 1, tower.items())


def test_what_the_gpu_blocks_measure_of_adapters_holds_on_a_cpu(stage: Stage) -> None:
    drawn = random_adapter(stage.folder, SHAPE.rank, 0)
    assert {name: value.shape for name, value in drawn.items()} == {
        name: value.shape for name, value in stage.adapters[0].items()
    }
    found = swaps(stage.engine, stage.encoder, stage.prompts[:2], stage.adapters[:2])
    assert found["adapter_again"] == 1 and found["adapter_swap_ms"] > 0
