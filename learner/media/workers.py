"""Processes that decode and encode media while the rank trains.

Each has the towers and a ``StoredEncoder`` of its own. What it made comes back through the store;
where that cannot take it, through the pipe."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import torch

from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.store import EmbeddingStore
from avatar_rl.learner.media.towers import Towers
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt

#: A pool that broke this often in a row is not started again.
MAX_BROKEN = 3


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


_Name = tuple[str, bool]  # prompt id, hinted


class Made(NamedTuple):
    """What a worker says of a prompt."""

    #: The prompt, pickled: torch would send tensors by shared memory, which dies with the worker.
    #: None: it is in the store.
    data: bytes | None
    seconds: float  # spent decoding and encoding

    @property
    def prompt(self) -> EncodedPrompt | None:
        """Of a process of our own, so that unpickling it runs nothing foreign."""
        return None if self.data is None else pickle.loads(self.data)


def make_encoder(spec: WorkerSpec, prompts: PromptEncoder | None = None) -> StoredEncoder:
    """The encoder of ``spec``; ``prompts`` where this process has one already."""

    def towers() -> Towers:
        return Towers(spec.model, dtype=spec.dtype, device=torch.device(spec.device))

    prompts = prompts or PromptEncoder(
        spec.model, MediaLoader(spec.media, base=Path(".")), spec.template
    )
    return StoredEncoder(prompts, EmbeddingStore(spec.folder, spec.bytes), spec.revision, towers)


class MediaWorkers:
    """``count`` worker processes. ``ask`` may be called from several threads."""

    def __init__(self, spec: WorkerSpec, count: int) -> None:
        self._spec, self._count = spec, count
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._broken = 0
        #: Asked and not done; those in ``_waiting`` are in no pool yet.
        self._asked: dict[_Name, Future[Made]] = {}
        self._waiting: deque[tuple[Prompt, bool]] = deque()
        self._running = 0
        self.busy_s = 0.0  # all workers, since the start

    def ask(self, prompt: Prompt, hinted: bool, *, first: bool = False) -> Future[Made]:
        """The prompt, in its turn, or before all that waits. Asking twice is asking once."""
        name = (prompt.id, hinted)
        with self._lock:
            future = self._asked.get(name)
            if future is None:
                future = self._asked[name] = Future()
                (self._waiting.appendleft if first else self._waiting.append)((prompt, hinted))
            elif first and (prompt, hinted) in self._waiting:
                self._waiting.remove((prompt, hinted))
                self._waiting.appendleft((prompt, hinted))
        self._pump()
        return future

    def close(self) -> None:
        """End the workers; what they work on is lost."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._waiting.clear()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _pump(self) -> None:
        """Give the pool as much as keeps it busy; the rest waits, where it can be overtaken."""
        while True:
            with self._lock:
                if not self._waiting or self._running > self._count:
                    return
                prompt, hinted = self._waiting.popleft()
                if self._pool is None:
                    self._pool = ProcessPoolExecutor(
                        self._count,
                        mp_context=get_context("spawn"),
                        initializer=_start,
                        initargs=(self._spec,),
                    )
                self._running += 1
                pool = self._pool
            name = (prompt.id, hinted)
            try:
                work = pool.submit(_make, prompt, hinted)
            except (BrokenProcessPool, RuntimeError) as error:
                self._settle(name, pool, error=error)
                continue
            work.add_done_callback(self._done(name, pool))

    def _done(self, name: _Name, pool: ProcessPoolExecutor) -> Callable[[Future[Made]], None]:
        def done(work: Future[Made]) -> None:
            if work.cancelled():
                self._settle(name, pool, error=RuntimeError("the workers were ended"))
            elif (error := work.exception()) is not None:
                self._settle(name, pool, error=error)
            else:
                self._settle(name, pool, made=work.result())
            self._pump()

        return done

    def _settle(
        self,
        name: _Name,
        pool: ProcessPoolExecutor,
        *,
        made: Made | None = None,
        error: BaseException | None = None,
    ) -> None:
        with self._lock:
            self._running -= 1
            future = self._asked.pop(name, None)
            if isinstance(error, BrokenProcessPool) and self._pool is pool:
                self._pool, self._broken = None, self._broken + 1
            elif made is not None:
                self._broken = 0
                self.busy_s += made.seconds
        if future is None:
            return
        if made is not None:
            future.set_result(made)
        else:
            future.set_exception(error or RuntimeError("a worker ended"))

    @property
    def alive(self) -> bool:
        """False once workers have died so often in a row that the rank had better do it."""
        return self._broken < MAX_BROKEN


_encoder: StoredEncoder | None = None  # a worker's


def _start(spec: WorkerSpec) -> None:
    """In a worker: get ready, and end when the rank does, however it ends."""
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(5)  # the step goes first
    torch.set_num_threads(spec.threads)
    _encoder = make_encoder(spec)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(prompt: Prompt, hinted: bool) -> Made:
    """In a worker: the prompt's entries, made where they are missing."""
    assert _encoder is not None
    start = time.perf_counter()
    key = _encoder.key(prompt, hinted)
    data = None
    if not _encoder.is_stored(key):
        made = _encoder.compute(key, prompt, hinted)
        data = None if _encoder.is_stored(key) else pickle.dumps(made)
    return Made(data, time.perf_counter() - start)
