"""Which encoder a rank takes: embeddings from the store, or pixels where towers train."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from avatar_rl.learner.config import EmbeddingsConfig
from avatar_rl.learner.media.ahead import AheadEncoder
from avatar_rl.learner.media.choice import why_off
from avatar_rl.learner.media.encoder import processing_words
from avatar_rl.learner.media.store import default_folder
from avatar_rl.learner.media.towers import revision_of, tower_revision
from avatar_rl.learner.media.workers import MediaWorkers, WorkerSpec, make_encoder
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.encoding.rope import MULTIMODAL
from avatar_rl.prompts.encoding.template import PromptEncoder


@dataclass(frozen=True)
class MediaSetting:
    """What the choice depends on, beside the config section."""

    model: Path
    reference: Path | None  # None: the run has none
    trained: Iterable[str]  # names of the parameters that train
    dtype: str
    device: torch.device
    media: MediaConfig
    template: TemplateConfig
    threads: int


def open_encoder(
    prompts: PromptEncoder, config: EmbeddingsConfig, setting: MediaSetting
) -> tuple[PromptEncoder | AheadEncoder, str]:
    """``prompts`` itself with the reason, or an encoder that takes embeddings and an empty text.

    Raises ConfigError where ``config.mode`` asks for what cannot be, InputError where the store's
    folder cannot be made.
    """
    model, reference = setting.model, setting.reference
    has_media = prompts.kind in MULTIMODAL
    asked = config.mode != "off" and has_media
    revision = tower_revision(model) if asked else ""
    same = reference is None or reference.resolve() == model.resolve()
    other = revision if same or not asked else tower_revision(reference or model)
    why = why_off(
        config,
        kind=prompts.kind,
        trained=setting.trained,
        revision=revision,
        reference="" if reference is None else other,
    )
    if why:
        return prompts, why
    spec = WorkerSpec(
        model=model,
        dtype=setting.dtype,
        device=str(setting.device),
        revision=revision_of([revision, *processing_words(model, setting.dtype)]),
        media=setting.media,
        template=setting.template.model_copy(update={"cache_bytes": 0}),
        folder=config.folder or default_folder(),
        bytes=config.bytes,
        threads=setting.threads,
    )
    workers = MediaWorkers(spec, config.workers) if config.workers else None
    return AheadEncoder(make_encoder(spec, prompts), workers), ""


def node_share(rank: int, ranks: int) -> tuple[int, int]:
    """(number, count) of this rank among those of its node. Collective."""
    hosts = [""] * ranks
    if ranks > 1:
        dist.all_gather_object(hosts, socket.gethostname())
    mine = [number for number, host in enumerate(hosts) if host == hosts[rank]]
    return mine.index(rank), len(mine)
