"""The rollout engine on a tiny Omni: sampling, weight adoption, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest, RolloutEngine
from avatar_rl.actors.engine.launch import CPU_KV_CACHE_BYTES
from avatar_rl.common.errors import DataError, ModelError, ResourceError
from avatar_rl.prompts.encoding.template import PromptEncoder, TemplateConfig
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from benchmarks.gpu_blocks import generation
from tests.tiny_models import (
    ArrayLoader,
    audio,
    image,
    load_reference,
    logprobs_of,
    make_prompt,
    respawn,
    video,
)

CONFIG = EngineConfig(device="cpu", max_model_len=512, max_num_seqs=32)
TOLERANCE = 1e-4
GREEDY = RequestSampling(temperature=0, max_tokens=24)


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_log_probabilities_of_a_large_vocabulary_are_not_biased(temperature: float | None) -> None:
    """262k words, most of them too unlikely to be added one by one to a float32 sum: torch's own
    log_softmax is off by 4e-5 on all of them here."""
    from avatar_rl.actors.engine.vllm_plugin.worker import RolloutSampler

    logits = 3 * torch.randn(4, 262_144, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = 22
    stock = SimpleNamespace(logprobs_mode="raw_logprobs", use_fp64_gumbel=False)
    sampler: Any = RolloutSampler(cast(Any, stock), torch.tensor([0]))
    if temperature is not None:
        logits, sampler._temperature = logits * temperature, torch.full((4,), temperature)
    exact = (logits.double() / (temperature or 1.0)).log_softmax(-1)
    found = sampler.compute_logprobs(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=5e-6, rtol=0)


class Stage:
    """Two policies of one model, and an engine that starts on the first."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / "first", folder / "second"]
        base = build_tiny_omni(folder / "base")
        self.weights = [respawn(base, out, seed) for seed, out in enumerate(self.folders)]
        self.loader = ArrayLoader()
        self.encoder = PromptEncoder(self.folders[0], self.loader, TemplateConfig())
        self.references = [load_reference(out) for out in self.folders]
        self.prompts = [
            make_prompt(self.loader, "text", []),
            make_prompt(
                self.loader, "long text", [], question="how many red squares are there " * 30
            ),
            make_prompt(self.loader, "image", [image(1)]),
            make_prompt(
                self.loader, "covered", [image(6)], question="how many red squares are there " * 20
            ),
            make_prompt(self.loader, "separate", [video(2, 4, 2.0), audio(3, 1.5)]),
            make_prompt(
                self.loader, "interleaved", [video(4, 8, 2.0), audio(5, 3.9)], audio_in_video=True
            ),
        ]
        fresh = RolloutEngine(self.folders[1], CONFIG)
        self.fresh = self.run(fresh, GREEDY)  # what an engine that never saw the first policy says
        fresh.close()
        with pytest.raises(ModelError, match="out of use"):
            fresh.step()
        self.engine = RolloutEngine(self.folders[0], CONFIG)

    def submit(self, engine: RolloutEngine, sampling: RequestSampling, seed: int = 0) -> None:
        for number, prompt in enumerate(self.prompts):
            engine.submit(
                prompt.id, self.encoder.engine_input(prompt, False), sampling, seed=seed + number
            )

    def run(
        self, engine: RolloutEngine, sampling: RequestSampling, seed: int = 0
    ) -> dict[str, FinishedRequest]:
        self.submit(engine, sampling, seed)
        return drain(engine)

    def adopt(self, which: int) -> None:
        self.engine.adopt(self.engine.version + 1, self.weights[which].items())


def drain(engine: RolloutEngine) -> dict[str, FinishedRequest]:
    finished: dict[str, FinishedRequest] = {}
    while engine.in_flight:
        finished |= {done.request_id: done for done in engine.step()}
    return finished


def tokens(finished: dict[str, FinishedRequest]) -> dict[str, list[list[int]]]:
    return {
        name: [part.token_ids.tolist() for part in done.completions]
        for name, done in finished.items()
    }


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("engine"))
    yield stage
    stage.engine.close()


@pytest.fixture(autouse=True)
def _start_on_the_first_policy(request: pytest.FixtureRequest) -> None:
    if "stage" in request.fixturenames:
        stage: Stage = request.getfixturevalue("stage")
        stage.engine.abort()
        stage.adopt(0)


def test_an_engine_that_slept_answers_as_before_and_adopts(stage: Stage) -> None:
    before = tokens(stage.run(stage.engine, GREEDY))
    stage.submit(stage.engine, GREEDY)
    with pytest.raises(ModelError, match="cannot sleep with 6 requests in flight"):
        stage.engine.sleep()
    assert tokens(drain(stage.engine)) == before
    stage.engine.sleep()
    stage.engine.sleep()  # once more changes nothing
    for forbidden in (
        stage.engine.step,
        lambda: stage.adopt(1),
        lambda: stage.run(stage.engine, GREEDY),
    ):
        with pytest.raises(ModelError, match="asleep"):
            forbidden()
    stage.engine.wake()
    assert tokens(stage.run(stage.engine, GREEDY)) == before
    stage.engine.sleep()
    stage.engine.wake()
    stage.adopt(1)
    assert tokens(stage.run(stage.engine, GREEDY)) == tokens(stage.fresh)


def test_keys_and_values_give_their_memory_back_while_it_sleeps(stage: Stage) -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    stage.engine.sleep()
    stage.engine.wake()  # from here on every page of the cache is there
    awake = resident()
    stage.engine.sleep()
    asleep = resident()
    stage.engine.wake()
    assert awake - asleep > 0.9 * CPU_KV_CACHE_BYTES
    assert abs(resident() - awake) < 0.1 * CPU_KV_CACHE_BYTES


def test_a_prompt_and_the_same_with_its_hint_keep_their_media_once(stage: Stage) -> None:
    media = [video(12, 4, 2.0), audio(13, 1.5)]
    for name, interleaved in (("hint", False), ("hint interleaved", True)):
        prompt = make_prompt(
            stage.loader, name, media, audio_in_video=interleaved, hint="count the red ones twice"
        )
        plain, hinted = (
            stage.engine.prepare(stage.encoder.engine_input(prompt, way)) for way in (False, True)
        )
        items = [
            (first, second)
            for kind, known in plain["mm_kwargs"].items()
            for first, second in zip(known, hinted["mm_kwargs"][kind], strict=True)
        ]
        assert len(items) == 2 and all(first is second for first, second in items)
        stage.engine.submit(name, hinted, GREEDY)
        [completion] = drain(stage.engine)[name].completions
        expected = logprobs_of(
            stage.references[0], stage.encoder.encode(prompt, True), completion.token_ids
        )
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


def test_adopted_weights_decode_like_a_fresh_engine_on_the_exported_checkpoint(
    stage: Stage,
) -> None:
    before = tokens(stage.run(stage.engine, GREEDY))
    stage.adopt(1)
    after = stage.run(stage.engine, GREEDY)
    assert tokens(after) == tokens(stage.fresh)
    assert tokens(after) != before
    for name, done in after.items():
        np.testing.assert_array_equal(
            done.completions[0].logprobs, stage.fresh[name].completions[0].logprobs
        )
    stage.adopt(0)
    assert (
        tokens(stage.run(stage.engine, GREEDY)) == before
    )  # prompts that recur, their media from the cache


def test_requests_in_flight_go_on_with_exactly_the_new_policy(stage: Stage) -> None:
    stage.submit(stage.engine, RequestSampling(n=4, max_tokens=40, ignore_eos=True))
    for _ in range(30):
        assert stage.engine.step() == []
    old = stage.engine.version
    stage.adopt(1)
    finished = drain(stage.engine)
    assert finished.keys() == {prompt.id for prompt in stage.prompts}
    for prompt in stage.prompts:
        encoded = stage.encoder.encode(prompt, False)
        for part in finished[prompt.id].completions:
            assert [version for version, _ in part.versions] == [old, old + 1]
            split = part.versions[0][1]
            assert (
                0 < split <= 30
                and sum(count for _, count in part.versions) == len(part.token_ids) == 40
            )
            first, second = (
                logprobs_of(reference, encoded, part.token_ids) for reference in stage.references
            )
            np.testing.assert_allclose(part.logprobs[:split], first[:split], atol=TOLERANCE)
            np.testing.assert_allclose(part.logprobs[split:], second[split:], atol=TOLERANCE)
            assert np.abs(first - second).max() > 0.1  # else the comparison would prove nothing


def test_media_covered_by_the_prefix_cache_are_encoded_again(stage: Stage) -> None:
    """vLLM strips media whose prefix blocks an earlier request filled; the adoption empties those
    blocks."""
    prompt = next(prompt for prompt in stage.prompts if prompt.id == "covered")
    sampling = RequestSampling(n=2, max_tokens=40, ignore_eos=True)
    for number, name in enumerate(("first", "second")):
        stage.engine.submit(name, stage.encoder.engine_input(prompt, False), sampling, seed=number)
        for _ in range(8):
            stage.engine.step()
    stage.engine.abort(["first"])  # else it is encoded again first, and the second finds its output
    old = stage.engine.version
    stage.adopt(1)
    encoded = stage.encoder.encode(prompt, False)
    [done] = drain(stage.engine).values()
    for part in done.completions:
        assert part.versions == ((old, 8), (old + 1, 32))
        expected = logprobs_of(stage.references[1], encoded, part.token_ids)
        np.testing.assert_allclose(part.logprobs[8:], expected[8:], atol=TOLERANCE)


def test_a_request_that_ended_in_part_before_adoption_tells_both_versions(stage: Stage) -> None:
    prompt = stage.prompts[0]
    sampling = RequestSampling(n=8, max_tokens=60)  # random weights end turns at random places
    stage.engine.submit("mixed", stage.encoder.engine_input(prompt, False), sampling, seed=1)
    for _ in range(30):
        stage.engine.step()
    assert stage.engine.in_flight == 1
    old = stage.engine.version
    stage.adopt(1)
    [done] = drain(stage.engine).values()
    for part in done.completions:
        assert sum(count for _, count in part.versions) == len(part.token_ids)
        assert [version for version, _ in part.versions] == (
            [old] if len(part.token_ids) <= 30 else [old, old + 1]
        )


def test_drain_mode_refuses_while_requests_are_in_flight(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stage.engine
    monkeypatch.setattr(engine, "config", CONFIG.model_copy(update={"weight_update": "drain"}))
    version = engine.version
    stage.submit(engine, GREEDY)
    assert not engine.can_adopt
    with pytest.raises(ModelError, match="6 requests in flight"):
        stage.adopt(1)
    assert engine.version == version
    drain(engine)
    assert engine.can_adopt
    stage.adopt(1)
    assert tokens(stage.run(engine, GREEDY)) == tokens(stage.fresh)


def broken(weights: dict[str, Tensor], how: str) -> list[tuple[str, Tensor]]:
    name = "thinker.model.layers.0.mlp.up_proj.weight"
    changed = dict(weights)
    if how == "missing":
        del changed[name]
    elif how == "unknown":
        changed["thinker.model.layers.99.mlp.up_proj.weight"] = changed[name]
    elif how == "twice":
        return [*changed.items(), (name, changed[name])]
    elif how == "shape":
        changed[name] = changed[name][:-1]
    elif how == "type":
        changed[name] = changed[name].long()
    else:
        changed[name] = changed[name].clone()
        changed[name][3, 5] = torch.nan if how == "NaN" else torch.inf
    return list(changed.items())


@pytest.mark.parametrize("how", ["missing", "unknown", "twice", "shape", "type", "NaN", "infinity"])
def test_a_bad_update_is_refused_and_the_engine_unchanged(stage: Stage, how: str) -> None:
    before = tokens(stage.run(stage.engine, GREEDY))
    version = stage.engine.version
    with pytest.raises(ModelError, match="refused"):
        stage.engine.adopt(version + 1, broken(stage.weights[1], how))
    assert stage.engine.version == version
    assert tokens(stage.run(stage.engine, GREEDY)) == before


def test_versions_only_grow(stage: Stage) -> None:
    with pytest.raises(ModelError, match="versions only grow"):
        stage.engine.adopt(stage.engine.version, stage.weights[1].items())


def test_seeds_reproduce_whatever_else_is_in_flight(stage: Stage) -> None:
    sampling = RequestSampling(n=4, max_tokens=24)
    together = tokens(stage.run(stage.engine, sampling, seed=7))
    assert tokens(stage.run(stage.engine, sampling, seed=7)) == together
    alone = {}
    for number, prompt in enumerate(stage.prompts):
        stage.engine.submit(
            prompt.id, stage.encoder.engine_input(prompt, False), sampling, seed=7 + number
        )
        alone |= tokens(drain(stage.engine))
    assert alone == together
    assert tokens(stage.run(stage.engine, sampling, seed=8)) != together
    for parts in together.values():
        assert len({tuple(part) for part in parts}) == 4
    # Completion 1 of one seed is not completion 0 of the next.
    shifted = tokens(stage.run(stage.engine, sampling, seed=8))
    assert together["text"][1] != shifted["text"][0]


def test_only_tokens_fit_for_a_completion_are_sampled(stage: Stage) -> None:
    tokenizer = stage.encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    sampling = RequestSampling(n=8, temperature=2.0, max_tokens=60)  # far from greedy over 512 rows
    for done in stage.run(stage.engine, sampling).values():
        for part in done.completions:
            body = part.token_ids[:-1] if part.finish_reason == "stop" else part.token_ids
            assert special.isdisjoint(body.tolist()) and max(body) < len(tokenizer)
            assert (part.finish_reason == "length") == (int(part.token_ids[-1]) not in special)
            assert part.text == tokenizer.decode(body)
            assert len(part.logprobs) == len(part.token_ids)


def test_abort_drops_what_it_names_and_leaves_the_rest(stage: Stage) -> None:
    stage.submit(stage.engine, RequestSampling(n=2, max_tokens=30))
    stage.engine.step()
    assert stage.engine.abort(["image", "unknown"]) == ["image"]
    assert drain(stage.engine).keys() == {prompt.id for prompt in stage.prompts} - {"image"}
    stage.submit(stage.engine, GREEDY)
    stage.engine.step()
    assert len(stage.engine.abort()) == len(stage.prompts)
    assert stage.engine.in_flight == 0
    assert stage.run(stage.engine, GREEDY).keys() == {prompt.id for prompt in stage.prompts}


def test_recurring_prompts_are_preprocessed_once(stage: Stage) -> None:
    prompt = make_prompt(stage.loader, "pooled", [video(30, 4, 2.0), audio(31, 1.0)])
    stage.engine._prompts._entries.clear()
    renderer = stage.engine._engine.renderer
    calls, stock = [], renderer.render_cmpl
    renderer.render_cmpl = lambda prompts: calls.append(1) or stock(prompts)
    try:
        outputs = []
        for _ in range(3):
            stage.engine.submit("pooled", stage.encoder.engine_input(prompt, False), GREEDY)
            outputs.append(tokens(drain(stage.engine)))
        # The same files, other content: a stale entry would answer for the wrong clip.
        other = make_prompt(stage.loader, "pooled", [video(32, 4, 2.0), audio(33, 1.0)])
        stage.engine.submit("pooled", stage.encoder.engine_input(other, False), GREEDY)
        drain(stage.engine)
    finally:
        renderer.render_cmpl = stock
    assert len(calls) == 2
    assert outputs[0] == outputs[1] == outputs[2]


def test_prompts_prepared_in_another_thread_give_the_same_completions(stage: Stage) -> None:
    expected = tokens(stage.run(stage.engine, GREEDY))
    inputs = {prompt.id: stage.encoder.engine_input(prompt, False) for prompt in stage.prompts}
    stage.engine._prompts._entries.clear()
    stage.submit(stage.engine, RequestSampling(n=4, max_tokens=60))
    with ThreadPoolExecutor(1) as pool:
        ahead = {name: pool.submit(stage.engine.prepare, value) for name, value in inputs.items()}
        drain(stage.engine)
        for name, prepared in ahead.items():
            stage.engine.submit(name, prepared.result(), GREEDY)
    assert tokens(drain(stage.engine)) == expected


def test_bad_requests_are_refused_and_others_go_on(stage: Stage) -> None:
    good: Prompt = stage.prompts[0]
    stage.engine.submit(good.id, stage.encoder.engine_input(good, False), GREEDY)
    with pytest.raises(DataError, match="already in flight"):
        stage.engine.submit(good.id, stage.encoder.engine_input(good, False), GREEDY)
    with pytest.raises(DataError, match="max_model_len"):
        stage.engine.submit("long", {"prompt_token_ids": [1] * 500}, RequestSampling(max_tokens=24))
    with pytest.raises(DataError, match="empty"):
        stage.engine.submit("empty", {"prompt_token_ids": []}, GREEDY)
    several = make_prompt(stage.loader, "several", [image(seed) for seed in range(40, 49)])
    with pytest.raises(DataError, match="several"):
        stage.engine.submit("several", stage.encoder.engine_input(several, False), GREEDY)
    assert stage.engine.in_flight == 1
    assert drain(stage.engine).keys() == {good.id}


def test_impossible_settings_are_refused(tmp_path: Path, stage: Stage) -> None:
    with pytest.raises(ValueError, match="equal completions"):
        RequestSampling(temperature=0, n=4)
    with pytest.raises(ModelError, match=r"no config\.json"):
        RolloutEngine(tmp_path, CONFIG)
    with pytest.raises(ResourceError, match="already runs"):
        RolloutEngine(stage.folders[1], CONFIG)
    with pytest.raises(ResourceError, match="sees no GPU"):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        RolloutEngine(stage.folders[0], CONFIG.model_copy(update={"device": "cuda"}))


def test_what_the_gpu_blocks_measure_of_an_engine_holds_on_a_cpu(stage: Stage) -> None:
    """Adoptions back and forth are bit-equal, and engine and learner agree (benchmarks/gpu.py)."""
    asked = generation.prompts(stage.loader, generation.TINY, 4)
    found = generation.adoptions(stage.engine, stage.encoder, asked, stage.weights)
    assert (found["adoptions_bit_equal"], found["adoptions_moved"]) == (1, 1)
    assert generation.speed(stage.engine, stage.encoder, asked[:2], 4) > 0
    done = generation.run(stage.engine, stage.encoder, asked, GREEDY)
    policy = generation.policy_of(stage.folders[0], torch.device("cpu"))
    gaps = generation.differences(policy, stage.encoder, asked, done, torch.device("cpu"))
    assert [len(gap) for gap in gaps] == [len(done[p.id].completions[0].token_ids) for p in asked]
    spread = generation.spread(gaps)
    assert spread["mismatch_max"] <= TOLERANCE and spread["gspo_clip_share_behaviour"] == 0
