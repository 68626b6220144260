"""Which encoder a rank takes: embeddings from the store, or pixels, made ahead or in the step."""

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
from avatar_rl.learner.media.workers import MediaWorkers, WorkerSpec, make_encoder
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.embeddings.names import store_revision, tower_revision
from avatar_rl.prompts.embeddings.store import default_folder
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
    """An encoder that takes embeddings and an empty text; else the reason, with an encoder whose
    workers make pixels ahead, or with ``prompts`` itself where there are no workers or no media.

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
    # Of towers that change with every step only the pixels can be made ahead. On a CPU workers
    # would take the step's own cores, so there somebody has to ask for it.
    wanted = config.mode == "pixels" or (config.mode == "auto" and setting.device.type == "cuda")
    pixels = bool(why) and wanted and has_media and config.workers > 0
    if why and not pixels:
        return prompts, why
    of_weights = "" if pixels else revision
    spec = WorkerSpec(
        model=model,
        dtype=setting.dtype,
        device=str(setting.device),
        revision=store_revision(model, setting.dtype, of_weights),
        media=setting.media,
        template=setting.template.model_copy(update={"cache_bytes": 0}),
        folder=config.folder or default_folder(),
        bytes=config.bytes,
        threads=setting.threads,
        pixels=pixels,
    )
    workers = MediaWorkers(spec, config.workers) if config.workers else None
    return AheadEncoder(make_encoder(spec, prompts), workers), why


def node_share(rank: int, ranks: int) -> tuple[int, int]:
    """(number, count) of this rank among those of its node. Collective."""
    hosts = [""] * ranks
    if ranks > 1:
        dist.all_gather_object(hosts, socket.gethostname())
    mine = [number for number, host in enumerate(hosts) if host == hosts[rank]]
    return mine.index(rank), len(mine)
