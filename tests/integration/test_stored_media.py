"""Rollouts that take the learner's stored embeddings: equal log-probabilities, no tower's run, and
the ordinary road for what is not stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest
from avatar_rl.actors.feeder import render
from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.towers import Towers
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.embeddings.store import EmbeddingStore, Stored
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.record import Prompt
from tests.parity_stage import Stage
from tests.tiny_models import image, make_prompt

TOLERANCE = 1e-5
SAMPLING = RequestSampling(n=2, max_tokens=12)
ROOM = 1 << 30


class Rollouts:
    """An engine on a tiny checkpoint, the learner's model, and the store between them."""

    def __init__(self, folder: Path, family: str) -> None:
        self.store = EmbeddingStore(folder / "store", ROOM)
        self.stage = Stage(folder, family, store=self.store)
        assert self.stage.stored is not None
        self.stored = self.stage.stored
        self.prompts = self.stage.prompts()
        self.calls: list[str] = []  # of towers in the engine
        self.stage.engine._engine.apply_model(self._listen)

    def _listen(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ("visual", "audio_tower"):
                module.register_forward_pre_hook(partial(self._heard, name))

    def _heard(self, name: str, *_: object) -> None:
        self.calls.append(name)

    def run(self, prompts: Sequence[Prompt]) -> list[FinishedRequest]:
        """All prompts through the engine, as the feeder hands them on, on empty caches."""
        stage, engine = self.stage, self.stage.engine
        stage.publish()
        self.calls.clear()
        for seed, prompt in enumerate(prompts):
            rendered = render(engine, stage.encoder, prompt, hinted=False)
            self.stored.fetch(rendered)
            engine.submit(prompt.id, rendered, SAMPLING, seed=seed)
        finished: dict[str, FinishedRequest] = {}
        while engine.in_flight:
            finished |= {done.request_id: done for done in engine.step()}
        return [finished[prompt.id] for prompt in prompts]

    def fill(self, prompts: Sequence[Prompt]) -> None:
        """As a worker of the learner's does."""
        encoder = StoredEncoder(
            PromptEncoder(self.stage.folder, self.stage.loader, TemplateConfig(cache_bytes=0)),
            self.store,
            self.stored.revision,
            lambda: Towers(self.stage.folder, dtype="float32", device=torch.device("cpu")),
        )
        for prompt in prompts:
            if prompt.media.items:
                encoder.compute(encoder.key(prompt, False), prompt, False)

    def gap(self, prompts: Sequence[Prompt], done: Sequence[FinishedRequest]) -> float:
        return max(
            self.stage.gap(prompt, one).logprob for prompt, one in zip(prompts, done, strict=True)
        )


@pytest.fixture(scope="module", params=["qwen2_5_omni", "qwen2_5_vl", "qwen3_vl", "qwen3_omni_moe"])
def rollouts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rollouts]:
    made = Rollouts(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.stage.close()


def media(prompts: Sequence[Prompt]) -> int:
    return sum(len(prompt.media.items) for prompt in prompts)


def test_stored_media_give_the_log_probabilities_of_the_ordinary_road(rollouts: Rollouts) -> None:
    prompts, stored = rollouts.prompts, rollouts.stored
    plain = rollouts.run(prompts)
    assert stored.taken == 0 and rollouts.calls
    assert rollouts.gap(prompts, plain) < TOLERANCE
    # One of them has its media in the store, the others' towers run.
    picture = next(prompt for prompt in prompts if prompt.id == "image")
    rollouts.fill([picture])
    rollouts.run(prompts)
    assert stored.taken == 1 and rollouts.calls
    rollouts.fill(prompts)
    again = rollouts.run(prompts)
    assert rollouts.calls == [] and stored.taken == 1 + media(prompts)
    assert rollouts.gap(prompts, again) < TOLERANCE
    for one, other in zip(plain, again, strict=True):
        for mine, its in zip(one.completions, other.completions, strict=True):
            assert mine.token_ids.tolist() == its.token_ids.tolist()
            np.testing.assert_allclose(mine.logprobs, its.logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("kept", [0, 1])
def test_an_entry_that_is_gone_or_of_other_length_is_the_ordinary_road(
    rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    stage, stored = rollouts.stage, rollouts.stored
    prompt = make_prompt(stage.loader, f"kept {kept}", [image(40 + kept)])
    rollouts.fill([prompt])
    whole = EmbeddingStore.get

    def damaged(store: EmbeddingStore, key: str) -> Stored | None:
        entry = whole(store, key)
        assert entry is not None
        if not kept:
            return None
        return entry._replace(tensors={"embeds": entry.tensors["embeds"][1:]})

    before = stored.taken
    monkeypatch.setattr(EmbeddingStore, "get", damaged)
    done = rollouts.run([prompt])
    assert stored.taken == before and rollouts.calls
    assert rollouts.gap([prompt], done) < TOLERANCE
    monkeypatch.undo()
    done = rollouts.run([prompt])  # it is there again
    assert stored.taken == before + 1 and rollouts.calls == []
    assert rollouts.gap([prompt], done) < TOLERANCE
