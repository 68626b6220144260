"""An engine and the learner's model on one tiny checkpoint: every layout of media a family takes,
compared token by token, before and after weights that come by the board."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest, RolloutEngine
from avatar_rl.actors.engine.stored_media import StoredMedia
from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.weights.block import unpack_weights
from avatar_rl.buffer_service.weights.links import GlooSender, open_store
from avatar_rl.buffer_service.weights.member import MemberSettings
from avatar_rl.buffer_service.weights.news import Noticeboard
from avatar_rl.buffer_service.weights.road_receiver import HeldWeights
from avatar_rl.buffer_service.weights.road_sender import Pass, RoadSender
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.buffer_service.weights.store import WeightMessage
from avatar_rl.cluster.adapter_road import adapter_road
from avatar_rl.cluster.config import RunConfig
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.model.export import export_checkpoint
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.names import NameMap
from avatar_rl.learner.publication import Road, Take, changing_tensors, published_adapter
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.embeddings.names import store_revision, tower_revision
from avatar_rl.prompts.embeddings.store import EmbeddingStore
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.record import Prompt
from tests.tiny_families import FAMILIES
from tests.tiny_models import (
    ArrayLoader,
    allowed_token_ids,
    audio,
    image,
    logits_of,
    make_prompt,
    respawn,
    video,
)

ENGINE = EngineConfig(device="cpu", max_model_len=1024, max_num_seqs=32)
OMNI = ("qwen2_5_omni", "qwen3_omni_moe")
TEXT = ("tied", "gemma3", "qwen3")
Layouts = dict[str, tuple[list[Any], bool]]  # name: media, sound interleaved with video


class Gap(NamedTuple):
    """What engine and learner disagree on, over some completions."""

    logprob: float  # largest difference of a token, in nats
    greedy: float  # share of greedy tokens that are not the learner's most likely ones


class Board:
    """What the weight store hands on: one version's bytes."""

    def __init__(self) -> None:
        self.message: WeightMessage | None = None

    def await_taken(self) -> None:
        pass

    def put(self, message: WeightMessage) -> None:
        self.message = message


class Twin:
    """The learner's end of the gloo twin, and an engine whose workers are members of its groups."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        self.redis = EmbeddedRedis(folder).start()
        config, run_id, url = BufferConfig(), "parity", self.redis.url
        settings = MemberSettings("rollout-0", config, run_id, url)
        self.members = stage.engine.join_transfers("gloo", settings)
        self.notices = Noticeboard(config, run_id, url)
        until(lambda: self.notices.members() == self.members)
        for name, parameter in stage.model.named_parameters():  # sent once, and never again
            parameter.requires_grad_(".layers.0." not in name and "visual" not in name)
        changing, fixed = stage.names.split(changing_tensors(nn.ModuleDict({"model": stage.model})))
        maps: dict[Pass, NameMap] = {"fixed": fixed, "changing": changing, "board": stage.names}
        store = open_store()
        roads = RoadSender(
            self.notices,
            stage.sender,
            {kind: names.layouts for kind, names in maps.items()},
            lambda client, source: GlooSender(client, source, store),
            board_every=1000,
        )
        self.road = Road(maps, roads)

    def publish(self, stage: Stage, version: int) -> HeldWeights:
        """Send the learner's weights; what the workers hold then."""

        def stream(take: Take, names: NameMap | None = None) -> None:
            assert names is not None
            take(names.publish(stage.parts(names)))

        self.road.publish(version, stream)
        sealed = self.notices.sealed()
        assert sealed is not None and (sealed.version, set(sealed.members)) == (
            version,
            self.members,
        ), sealed
        return HeldWeights(sealed.token)

    def close(self) -> None:
        if self.road.sender is not None:
            self.road.sender.close()
        self.redis.stop()


def until(condition: Callable[[], bool], deadline_s: float = 30.0) -> None:
    """Waits for ``condition``."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Stage:
    """A family's tiny checkpoint, ``folder / "model"``, an engine on it and the learner's model."""

    def __init__(
        self,
        folder: Path,
        family: str,
        config: EngineConfig = ENGINE,
        lora: LoraConfig | None = None,
        store: EmbeddingStore | None = None,
    ) -> None:
        """With ``lora`` the learner's model has an adapter, which ``publish`` sends. With ``store``
        the engine takes what that has of media."""
        self.family, self.config = family, config
        self.folder = folder / "model"
        respawn(FAMILIES[family](folder / "base"), self.folder, seed=1)
        self.loader = ArrayLoader()
        self.encoder = PromptEncoder(self.folder, self.loader, TemplateConfig())
        self.allowed = allowed_token_ids(self.encoder.tokenizer)
        self.model = load_model(self.folder).eval()
        self.names, self.board = NameMap.of(self.model, self.folder), Board()
        self.sender = WeightSender(self.names.layout, cast("Outbox", self.board), dtype="float32")
        self.adapter, shape = None, None
        if lora is not None:
            recipe = {"data": {"synthetic": {}}, "learner": {"lora": lora.model_dump()}}
            shape, why = adapter_road(RunConfig.model_validate(recipe), self.folder)
            assert shape is not None, why
            self.adapter = Adapter.attach(self.model, lora)
        self.stored = None
        if store is not None:
            revision = store_revision(self.folder, "float32", tower_revision(self.folder))
            self.stored = StoredMedia(store, revision)
        self.engine = RolloutEngine(self.folder, config, adapter=shape, stored=self.stored)
        self.twin: Twin | None = None

    def prompts(self, layouts: Layouts | None = None) -> list[Prompt]:
        """One for each layout."""
        chosen = layouts_of(self.family) if layouts is None else layouts
        return [
            make_prompt(self.loader, name, media, audio_in_video=interleaved)
            for name, (media, interleaved) in chosen.items()
        ]

    def run(
        self, prompts: Sequence[Prompt], sampling: RequestSampling, *, hinted: bool = False
    ) -> list[FinishedRequest]:
        """All prompts at once through the engine."""
        return run(self.engine, self.encoder, prompts, sampling, hinted=hinted)

    @torch.no_grad()
    def gap(
        self,
        prompt: Prompt,
        done: FinishedRequest,
        temperature: float = 1.0,
        *,
        hinted: bool = False,
    ) -> Gap:
        """Over all completions of a prompt; fails when the prompt tokens differ."""
        encoded = self.encoder.encode(prompt, hinted)
        np.testing.assert_array_equal(done.prompt_token_ids, encoded.input_ids.numpy())
        assert prompt_digest(done.prompt_token_ids) == encoded.digest
        worst, other, tokens = 0.0, 0, 0
        for part in done.completions:
            logits = logits_of(self.model, encoded, part.token_ids) / temperature
            ids = torch.from_numpy(part.token_ids).long()[:, None]
            found = logits.log_softmax(-1).gather(1, ids)[:, 0].numpy()
            worst = max(worst, float(np.abs(found - part.logprobs).max()))
            best = logits[:, self.allowed].max(-1).values
            other += int((logits.gather(1, ids)[:, 0] < best - 1e-5).sum())
            tokens += len(ids)
        return Gap(worst, other / tokens)

    def gaps(self, prompts: Sequence[Prompt], sampling: RequestSampling) -> dict[str, Gap]:
        """By prompt."""
        done = self.run(prompts, sampling)
        return {
            prompt.id: self.gap(prompt, finished, sampling.temperature or 1.0)
            for prompt, finished in zip(prompts, done, strict=True)
        }

    @torch.no_grad()
    def train(self, seed: int) -> None:
        """Every parameter moves a little."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            size = parameter.std().nan_to_num() if parameter.numel() > 1 else 0.0
            parameter += 0.2 * size * torch.randn(parameter.shape, generator=generator)

    @torch.no_grad()
    def train_adapter(self, seed: int) -> None:
        """Both sides of every layer are drawn anew."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def serve_merged(self) -> None:
        """From now on an engine that takes whole weights, as a fresh one begins."""
        self.engine.close()
        self.engine = RolloutEngine(self.folder, self.config)

    def parts(self, names: NameMap) -> Iterator[dict[str, Tensor]]:
        """The model's tensors, part by part; with an adapter in them where there is one."""
        state: Mapping[str, Tensor] = self.model.state_dict()
        if self.adapter is not None:
            state = self.adapter.merged(state)
        return ({name: state[name] for name in part} for part in names.parts)

    def publish(self, road: str = "board") -> None:
        """The learner's weights to the engine, by the board (merged, with an adapter) or by
        the gloo twin; or the adapter alone."""
        version = self.engine.version + 1
        if road == "twin":
            self.twin = self.twin or Twin(self.folder.parent / "redis", self)
            held = self.twin.publish(self, version)
            assert self.engine.adopt(version, held)
            assert not self.engine.adopt(version + 1, held)  # once only
            return
        if road == "adapter":
            assert self.adapter is not None
            tensors = self.adapter.tensors(self.model.state_dict())
            self.engine.adopt(version, published_adapter(tensors, self.names).items())
            return
        self.sender.publish(version, self.names.publish(self.parts(self.names)))
        assert self.board.message is not None
        self.engine.adopt(version, unpack_weights(self.board.message).items())

    def close(self) -> None:
        """Stop the engine, and the twin."""
        self.engine.close()
        if self.twin is not None:
            self.twin.close()

    def export(self, out: Path) -> Path:
        """The learner's weights as a checkpoint."""
        return export_checkpoint(self.names.publish(self.parts(self.names)), self.folder, out)


def run(
    engine: RolloutEngine,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    sampling: RequestSampling,
    *,
    hinted: bool = False,
) -> list[FinishedRequest]:
    """All prompts at once, in their order."""
    for seed, prompt in enumerate(prompts):
        engine.submit(prompt.id, encoder.engine_input(prompt, hinted), sampling, seed=seed)
    finished: dict[str, FinishedRequest] = {}
    while engine.in_flight:
        finished |= {done.request_id: done for done in engine.step()}
    return [finished[prompt.id] for prompt in prompts]


def layouts_of(family: str) -> Layouts:
    """Every kind and arrangement of media the family takes; frame rates off the default and clips
    longer than wide."""
    found: Layouts = {"text": ([], False)}
    if family not in TEXT:
        found |= {
            "image": ([image(1)], False),
            "two images": ([image(2), image(3)], False),
            "video, 1 fps": ([video(4, 8, 1.0)], False),
            "video, 2 fps": ([video(4, 4, 2.0)], False),
            "video, 4 fps": ([video(4, 16, 4.0)], False),
            "long video then image": ([video(5, 16, 3.3), image(6)], False),
            "two videos": ([video(7, 8, 1.7), video(8, 8, 1.7)], False),
        }
    if family in OMNI:
        found |= {
            f"sound of {seconds} s": ([audio(9, seconds)], False)
            for seconds in (0.3, 0.5, 1.0, 2.005, 2.0653, 3.3)
        }
        found |= {
            "short and long sound": ([audio(9, 0.4), audio(10, 3.0)], False),
            "video and audio": ([video(10, 8, 2.0), audio(11, 3.0)], False),
            "audio then video": ([audio(12, 1.2), video(13, 4, 10 / 3)], False),
            "all, apart": ([image(10), video(10, 4, 4.0), audio(11, 0.7)], False),
            "interleaved, 1 fps": ([video(18, 4, 1.0), audio(19, 3.9)], True),
            "interleaved, 2 fps": ([video(14, 8, 2.0), audio(15, 3.9)], True),
            "interleaved, 4 fps": ([video(14, 12, 4.0), audio(15, 3.0)], True),
            "interleaved, other rate": ([video(16, 4, 10 / 3), audio(17, 1.2)], True),
            "interleaved, odd length": ([video(14, 8, 2.0), audio(15, 3.9037)], True),
            "interleaved, sound ends early": ([video(20, 16, 2.0), audio(21, 2.5)], True),
            "interleaved, wide": ([video(14, 4, 2.0, 32, 640), audio(15, 1.1)], True),
            "interleaved twice and image": (
                [video(22, 8, 4.55), audio(23, 1.5), video(24, 4, 4.55), audio(25, 2.5), image(26)],
                True,
            ),
        }
    return found
