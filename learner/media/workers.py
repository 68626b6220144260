"""Processes that decode and encode media while the rank trains.

Each has the towers and a ``StoredEncoder`` of its own. What it made comes back through the store;
where that cannot take it, through the pipe."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.pixels import StoredPixels
from avatar_rl.learner.media.towers import Towers
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.embeddings.store import EmbeddingStore
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.workers.pool import WorkerPool

_Question = tuple[Prompt, bool]  # hinted?


@dataclass(frozen=True)
class WorkerSpec:
    """All a worker needs; plain data, sent once."""

    model: Path
    dtype: str
    device: str
    revision: str
    media: MediaConfig
    template: TemplateConfig
    folder: Path
    bytes: int
    threads: int
    pixels: bool = False  # towers train: media are decoded and processed, and no more


def make_encoder(spec: WorkerSpec, prompts: PromptEncoder | None = None) -> StoredEncoder:
    """The encoder of ``spec``; ``prompts`` where this process has one already."""

    def towers() -> Towers:
        return Towers(spec.model, dtype=spec.dtype, device=torch.device(spec.device))

    prompts = prompts or PromptEncoder(
        spec.model, MediaLoader(spec.media, base=Path(".")), spec.template
    )
    store = EmbeddingStore(spec.folder, spec.bytes)
    if spec.pixels:
        return StoredPixels(prompts, store, spec.revision)
    return StoredEncoder(prompts, store, spec.revision, towers)


class MediaWorkers:
    """``count`` worker processes. ``ask`` may be called from several threads."""

    def __init__(self, spec: WorkerSpec, count: int) -> None:
        self._pool: WorkerPool[_Question, EncodedPrompt | None]
        self._pool = WorkerPool(partial(_open, spec), count)

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return self._pool.pids

    @property
    def alive(self) -> bool:
        """False once workers have died so often in a row that the rank had better do it."""
        return self._pool.alive

    @property
    def busy_s(self) -> float:
        """Seconds spent decoding and encoding, all workers, since the start."""
        return self._pool.busy_s

    def ask(
        self, prompt: Prompt, hinted: bool, *, first: bool = False
    ) -> Future[EncodedPrompt | None]:
        """The prompt, in its turn, or before all that waits; None: it is in the store. Asking twice
        is asking once."""
        return self._pool.ask((prompt.id, hinted), (prompt, hinted), first=first)

    def close(self) -> None:
        """End the workers; what they work on is lost."""
        self._pool.close()


def _open(spec: WorkerSpec) -> Callable[[_Question], EncodedPrompt | None]:
    """In a worker: what makes a prompt's entries."""
    torch.set_num_threads(spec.threads)
    return partial(_make, make_encoder(spec))


def _make(encoder: StoredEncoder, asked: _Question) -> EncodedPrompt | None:
    """In a worker: the prompt's entries, made where they are missing. The prompt itself where the
    store cannot take them."""
    prompt, hinted = asked
    key = encoder.key(prompt, hinted)
    if encoder.is_stored(key):
        return None
    made = encoder.compute(key, prompt, hinted)
    return None if encoder.is_stored(key) else made
