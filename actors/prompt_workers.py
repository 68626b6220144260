"""Processes that decode and preprocess the media of coming prompts, so that neither the engine's
thread nor Python's lock waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from avatar_rl.common.errors import DataError
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.workers.pool import WorkerGoneError, WorkerPool

if TYPE_CHECKING:
    from avatar_rl.actors.engine.prompt_cache import RenderedPrompt

log = logging.getLogger(__name__)

ATTEMPTS = 3  # workers that may die over a prompt until it is to blame


@dataclass(frozen=True)
class PromptWorkerSpec:
    """All a worker needs; plain data, sent once."""

    model: Path
    media: MediaConfig
    template: TemplateConfig
    engine: bytes  # RolloutEngine.settings
    revision: str = ""  # of the store's embeddings; empty where none are taken


class _Question(NamedTuple):
    prompt_id: str
    parts: tuple[tuple[str, Prompt], ...]  # parts of one prompt share what is decoded
    hinted: bool

    @property
    def name(self) -> tuple[str, tuple[str, ...], bool]:
        return self.prompt_id, tuple(part for part, _ in self.parts), self.hinted


#: A prompt as the engine takes it, and the store's names of its media by vLLM's hash.
Prepared = tuple["RenderedPrompt", Mapping[str, str]]
_ByPart = Mapping[str, Prepared]


class PromptWorkers:
    """``count`` worker processes. One thread calls ``start`` and ``close``, any may call ``ask``.

    Each imports vLLM without an engine: about 20 s on two cores, and memory of its own.
    """

    def __init__(self, spec: PromptWorkerSpec, count: int) -> None:
        self._spec, self._count = spec, count
        self._pool: WorkerPool[_Question, _ByPart] | None = None
        self._busy_s = 0.0  # of workers that have ended

    @property
    def busy_s(self) -> float:
        """Seconds that workers spent on prompts, all together."""
        return self._busy_s + (0.0 if self._pool is None else self._pool.busy_s)

    @property
    def up(self) -> bool:
        """A worker is there. Before the first is, who asks would wait longer than doing it."""
        return self._pool is not None and self._pool.up

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [] if self._pool is None else self._pool.pids

    def start(self) -> None:
        """Begin to start the workers, unless they have been; returns at once."""
        if self._pool is None:
            self._pool = WorkerPool(partial(_open, self._spec), self._count)
            self._pool.start()

    def close(self) -> None:
        """End them; what they work on fails."""
        if self._pool is not None:
            self._pool.close()
            self._busy_s += self._pool.busy_s
            self._pool = None

    def ask(self, parts: Mapping[str, Prompt], *, hinted: bool) -> Future[_ByPart]:
        """The ``parts`` of one prompt as the engine takes them.

        A worker that dies is replaced and its prompt asked again. The future fails with DataError
        where that happens ATTEMPTS times with one prompt, or the prompt cannot be prepared. Any
        other error says nothing of the prompt: do it yourself.
        """
        [prompt_id] = {prompt.id for prompt in parts.values()}
        future: Future[_ByPart] = Future()
        self._try(future, _Question(prompt_id, tuple(parts.items()), hinted), 1)
        return future

    def _try(self, future: Future[_ByPart], question: _Question, attempt: int) -> None:
        pool = self._pool
        if pool is None:
            future.set_exception(WorkerGoneError("the workers were ended"))
            return
        inner = pool.ask(question.name, question)
        inner.add_done_callback(partial(self._tried, future, question, attempt))

    def _tried(
        self,
        future: Future[_ByPart],
        question: _Question,
        attempt: int,
        inner: Future[_ByPart],
    ) -> None:
        error = inner.exception()
        if error is None:
            future.set_result(inner.result())
        elif not (isinstance(error, WorkerGoneError) and error.at_work):
            future.set_exception(error)
        elif attempt < ATTEMPTS:
            log.warning("prompt %s: %s; another is asked", question.prompt_id, error)
            self._try(future, question, attempt + 1)
        else:
            future.set_exception(
                DataError(
                    f"prompt {question.prompt_id!r}: {ATTEMPTS} worker processes died over its "
                    "media, perhaps of too little memory: shorten its clip, lower max_pixels, or "
                    "leave it out"
                )
            )


def _open(spec: PromptWorkerSpec) -> Callable[[_Question], _ByPart]:
    """In a worker: what prepares prompts."""
    import torch

    from avatar_rl.actors.engine.rendering import rendered_by, renderer_of
    from avatar_rl.actors.engine.stored_media import stored_names
    from avatar_rl.prompts.encoding.template import PromptEncoder
    from avatar_rl.prompts.media.loader import MediaLoader

    torch.set_num_threads(1)
    renderer = renderer_of(spec.engine)
    loader = MediaLoader(spec.media, base=Path("."))
    encoder = PromptEncoder(spec.model, loader, spec.template)

    def prepare(asked: _Question) -> _ByPart:
        found: dict[str, Prepared] = {}
        for part, prompt in asked.parts:
            given = encoder.engine_input(prompt, asked.hinted)
            rendered = rendered_by(renderer, given, prompt.id)
            names: Mapping[str, str] = {}
            if spec.revision:
                names = stored_names(spec.revision, loader, prompt, given, rendered)
            found[part] = rendered, names
        return found

    return prepare
