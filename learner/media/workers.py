"""Processes that decode and encode media while the rank trains.

Each has the towers and a ``StoredEncoder`` of its own. What it made comes back through the store;
where that cannot take it, through the pipe."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.pixels import StoredPixels
from avatar_rl.learner.media.store import EmbeddingStore
from avatar_rl.learner.media.towers import Towers
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt

#: After so many deaths of workers in a row none is started again.
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
    pixels: bool = False  # towers train: media are decoded and processed, and no more


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
    store = EmbeddingStore(spec.folder, spec.bytes)
    if spec.pixels:
        return StoredPixels(prompts, store, spec.revision)
    return StoredEncoder(prompts, store, spec.revision, towers)


class WorkerGoneError(Exception):
    """A worker died over what it was asked."""


class MediaWorkers:
    """``count`` worker processes. ``ask`` may be called from several threads.

    A thread of the rank's belongs to each and talks to it through a pipe. The pools of the standard
    library would need named semaphores, which stay in shared memory when a rank is killed."""

    def __init__(self, spec: WorkerSpec, count: int) -> None:
        self._spec, self._count = spec, count
        self._changed = threading.Condition()
        self._processes: dict[int, BaseProcess] = {}  # by the number of their thread
        self._threads: list[threading.Thread] = []
        self._broken = 0
        self._closed = False
        #: Asked and not done; those in ``_waiting`` are with no worker yet.
        self._asked: dict[_Name, Future[Made]] = {}
        self._waiting: deque[tuple[Prompt, bool]] = deque()
        self.busy_s = 0.0  # all workers, since the start

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        with self._changed:
            return [one.pid for one in self._processes.values() if one.pid and one.is_alive()]

    def ask(self, prompt: Prompt, hinted: bool, *, first: bool = False) -> Future[Made]:
        """The prompt, in its turn, or before all that waits. Asking twice is asking once."""
        name = (prompt.id, hinted)
        with self._changed:
            future = self._asked.get(name)
            if future is None:
                future = self._asked[name] = Future()
                (self._waiting.appendleft if first else self._waiting.append)((prompt, hinted))
            elif first and (prompt, hinted) in self._waiting:
                self._waiting.remove((prompt, hinted))
                self._waiting.appendleft((prompt, hinted))
            while len(self._threads) < self._count and not self._closed:
                thread = threading.Thread(target=self._serve, args=(len(self._threads),))
                thread.daemon = True
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """End the workers; what they work on is lost."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            processes = list(self._processes.values())
            self._changed.notify_all()
        for process in processes:
            process.kill()
        for thread in self._threads:
            thread.join()
        with self._changed:
            lost, self._asked = list(self._asked.values()), {}
        for future in lost:
            future.set_exception(WorkerGoneError("the workers were ended"))

    def _serve(self, number: int) -> None:
        """A thread: asks its worker one prompt after the other, and starts it anew when it dies."""
        pipe: Connection | None = None
        while (asked := self._next()) is not None:
            made: Made | None = None
            error: Exception | None = None
            try:
                pipe = pipe or self._start(number)
                pipe.send(asked)
                answer = pipe.recv()
                made, error = (answer, None) if isinstance(answer, Made) else (None, answer)
            except (EOFError, OSError) as gone:
                error = WorkerGoneError(f"a worker died ({gone or type(gone).__name__})")
                if pipe is not None:
                    pipe.close()
                pipe = None
            except Exception as unreadable:  # an error that does not survive the pipe, say
                error = unreadable
            self._settle((asked[0].id, asked[1]), made, error)
        if pipe is not None:
            pipe.close()

    def _next(self) -> tuple[Prompt, bool] | None:
        """What waits first; None once there is nothing to do any more."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return None if self._closed else self._waiting.popleft()

    def _start(self, number: int) -> Connection:
        context = get_context("spawn")
        ours, its = context.Pipe()
        process = context.Process(target=_work, args=(its, self._spec), daemon=True)
        process.start()
        its.close()
        with self._changed:
            self._processes[number] = process
            if self._closed:
                process.kill()
        return ours

    def _settle(self, name: _Name, made: Made | None, error: Exception | None) -> None:
        with self._changed:
            future = self._asked.pop(name, None)
            if isinstance(error, WorkerGoneError):
                self._broken += 1
            elif made is not None:
                self._broken = 0
                self.busy_s += made.seconds
        if future is None:
            return
        if made is not None:
            future.set_result(made)
        else:
            future.set_exception(error or WorkerGoneError("a worker ended"))

    @property
    def alive(self) -> bool:
        """False once workers have died so often in a row that the rank had better do it."""
        return self._broken < MAX_BROKEN


_encoder: StoredEncoder | None = None  # a worker's


def _work(pipe: Connection, spec: WorkerSpec) -> None:
    """A worker: makes what it is asked, and ends when the rank does, however it ends."""
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(5)  # the step goes first
    torch.set_num_threads(spec.threads)
    _encoder = make_encoder(spec)
    while True:
        try:
            prompt, hinted = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_make(prompt, hinted))
        except Exception as error:  # the rank raises it
            pipe.send(error)


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
