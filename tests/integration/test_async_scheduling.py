"""Versions of tokens while vLLM schedules a step ahead.

Its CPU build switches async scheduling off, and its model runner needs CUDA's streams for it. What
decides versions is the scheduler and the queue of steps under way: here they are vLLM's own, over
a model runner that computes at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.actors.engine import engine as engine_module
from avatar_rl.actors.engine.engine import GeneratedCompletion
from avatar_rl.actors.engine.launch import pick_device, prepare_environment
from avatar_rl.common.errors import ResourceError
from avatar_rl.prompts.record import Prompt
from tests.parity_stage import Stage, layouts_of
from tests.tiny_models import logits_of

TOLERANCE = 1e-5
TOKENS = 24
CONFIG = EngineConfig(device="cpu", max_model_len=512, max_num_seqs=8)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    prepare_environment(CONFIG, "cpu")
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    checked, made = CpuPlatform.check_and_update_config, CPUModelRunner.__init__
    arguments = engine_module.engine_arguments

    def check(config: Any) -> None:
        checked(config)
        config.scheduler_config.async_scheduling = True

    def make(self: Any, vllm_config: Any, *given: Any) -> None:
        vllm_config.scheduler_config.async_scheduling = False
        made(self, vllm_config, *given)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check))
        patch.setattr(CPUModelRunner, "__init__", make)
        patch.setattr(
            engine_module,
            "engine_arguments",
            lambda *given: arguments(*given) | {"async_scheduling": True},
        )
        stage = Stage(tmp_path_factory.mktemp("async"), "qwen3_vl", CONFIG)
    yield stage
    stage.close()


def weights_of(stage: Stage) -> Weights:
    return {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}


@torch.no_grad()
def gap(
    stage: Stage, prompt: Prompt, completion: GeneratedCompletion, versions: dict[int, Weights]
) -> float:
    """Of each token from the learner's model with the weights that the token is said to be of."""
    encoded, ids = stage.encoder.encode(prompt, False), torch.from_numpy(completion.token_ids)
    worst, at, kept = 0.0, 0, weights_of(stage)
    for version, count in completion.versions:
        stage.model.load_state_dict(versions[version])
        scores = logits_of(stage.model, encoded, completion.token_ids).log_softmax(-1)
        found = scores.gather(1, ids.long()[:, None])[at : at + count, 0].numpy()
        worst = max(worst, float(np.abs(found - completion.logprobs[at : at + count]).max()))
        at += count
    stage.model.load_state_dict(kept)
    assert at == len(ids)
    return worst


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, TOKENS - 1])
def test_every_token_is_of_the_version_that_it_is_said_to_be(
    stage: Stage, steps: int, greedy: bool
) -> None:
    engine = stage.engine
    prompts = stage.prompts({name: layouts_of("qwen3_vl")[name] for name in ("text", "image")})
    sampling = RequestSampling(
        n=1 if greedy else 2, temperature=0 if greedy else 1, max_tokens=TOKENS, ignore_eos=True
    )
    for seed, prompt in enumerate(prompts):
        engine.submit(prompt.id, stage.encoder.engine_input(prompt, False), sampling, seed=seed)
    for _ in range(steps):
        assert engine.step() == []
    assert engine.steps_under_way == 1
    version, versions = engine.version, {engine.version: weights_of(stage)}
    stage.train(version + 1)
    stage.publish()
    versions[version + 1] = weights_of(stage)
    done = {}
    while engine.in_flight:
        done |= {finished.request_id: finished for finished in engine.step()}
    for prompt in prompts:
        for completion in done[prompt.id].completions:
            # The step under way is not counted: its token was sampled again.
            before = ((version, steps - 1),) if steps > 1 else ()
            assert completion.versions == (*before, (version + 1, TOKENS - steps + 1))
            assert gap(stage, prompt, completion, versions) <= TOLERANCE


def test_a_step_of_requests_that_have_ended_does_not_meet_new_weights(stage: Stage) -> None:
    """Half of the vocabulary ends a turn here, so that who ends is known a step too late."""
    engine = stage.engine
    [prompt] = stage.prompts({"text": ([], False)})
    ends, engine._stop_ids = engine._stop_ids, frozenset(stage.allowed[::2])
    sampling, left = RequestSampling(n=4, max_tokens=TOKENS), 0
    try:
        for seed in range(4):
            [done] = stage.run([prompt], sampling)
            left += engine.steps_under_way
            versions = {engine.version: weights_of(stage)}
            assert all(gap(stage, prompt, part, versions) <= TOLERANCE for part in done.completions)
            stage.train(100 + seed)
            stage.publish()
            assert engine.steps_under_way == 0
    finally:
        engine._stop_ids = ends
    assert left


def test_a_cpu_has_no_such_thing() -> None:
    with pytest.raises(ResourceError, match=r"rollout\.engine\.async_scheduling needs a GPU"):
        pick_device(CONFIG.model_copy(update={"async_scheduling": True}))
