"""Worker processes that answer questions ahead of their parent's need.

A thread of the parent's belongs to each and talks to it through a pipe. The pools of the standard
library would need named semaphores, which stay in shared memory when the parent is killed."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

from avatar_rl.prompts.workers import parcel

log = logging.getLogger(__name__)

#: After so many failures in a row nothing is tried again.
MAX_BROKEN = 3

Question = TypeVar("Question")
Answer = TypeVar("Answer")
#: Made once in each worker; then it answers question after question.
Opener = Callable[[], Callable[[Question], Answer]]


class WorkerGoneError(Exception):
    """A worker died. ``at_work``: over the question; else it did not come up, or was ended."""

    def __init__(self, message: str, *, at_work: bool = False) -> None:
        super().__init__(message)
        self.at_work = at_work


class _Reply(NamedTuple):
    """What a worker sends: an answer, or the error in its place."""

    answer: Any
    error: Exception | None
    seconds: float


class _Asked(NamedTuple):
    name: Hashable
    question: Any


class WorkerPool(Generic[Question, Answer]):
    """``count`` processes, each with its own ``opener()``. ``ask`` may be called from several
    threads.

    A worker that dies is replaced; what it was asked fails with WorkerGoneError. Workers end with
    their parent, however it ends.
    """

    def __init__(self, opener: Opener[Question, Answer], count: int, *, niceness: int = 5) -> None:
        self._opener, self._count, self._niceness = opener, count, niceness
        self._changed = threading.Condition()
        self._processes: dict[int, BaseProcess] = {}  # by the number of their thread
        self._up: set[int] = set()  # threads whose worker has said that it is there
        self._threads: list[threading.Thread] = []
        self._died = 0  # workers in a row
        self._stillborn = 0  # of them, those in a row that did not come up
        self._closed = False
        #: Asked and not done; those in ``_waiting`` are with no worker yet.
        self._asked: dict[Hashable, Future[Answer]] = {}
        self._waiting: deque[_Asked] = deque()
        self.busy_s = 0.0  # all workers, since the start

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        with self._changed:
            return [one.pid for one in self._processes.values() if one.pid and one.is_alive()]

    @property
    def alive(self) -> bool:
        """False once workers have died so often in a row that the parent had better do it."""
        return self._died < MAX_BROKEN

    @property
    def starts(self) -> bool:
        """False once so many workers in a row did not come up that none will."""
        return self._stillborn < MAX_BROKEN

    @property
    def up(self) -> bool:
        """A worker is there and takes questions."""
        return bool(self._up)

    def start(self) -> None:
        """Begin to start all workers, which otherwise the first question does."""
        with self._changed:
            self._start_threads()

    def ask(self, name: Hashable, question: Question, *, first: bool = False) -> Future[Answer]:
        """The answer, in its turn, or before all that waits. To ask twice under one ``name`` is to
        ask once. It fails with what the worker raised, or with WorkerGoneError."""
        with self._changed:
            future = self._asked.get(name)
            if future is None:
                future = Future()
                if self._closed:
                    future.set_exception(WorkerGoneError("the workers were ended"))
                    return future
                self._asked[name] = future
                asked = _Asked(name, question)
                (self._waiting.appendleft if first else self._waiting.append)(asked)
            elif first:
                self._to_front(name)
            self._start_threads()
            self._changed.notify()
        return future

    def close(self) -> None:
        """End the workers; what they work on fails."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            processes = list(self._processes.values())
            self._changed.notify_all()
        for process in processes:
            process.kill()
        for thread in self._threads:
            thread.join()
        for process in processes:
            process.join()
        with self._changed:
            lost, self._asked = list(self._asked.values()), {}
        for future in lost:
            future.set_exception(WorkerGoneError("the workers were ended"))

    def _to_front(self, name: Hashable) -> None:
        waiting = next((one for one in self._waiting if one.name == name), None)
        if waiting is not None:
            self._waiting.remove(waiting)
            self._waiting.appendleft(waiting)

    def _start_threads(self) -> None:
        while len(self._threads) < self._count and not self._closed:
            number = len(self._threads)
            thread = threading.Thread(target=self._serve, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, number: int) -> None:
        """A thread: asks its worker one question after the other, and starts it anew when it
        dies."""
        pipe: Connection | None = None
        while not self._closed:
            try:
                pipe = pipe or self._start(number)
            except (EOFError, OSError) as gone:
                self._not_started(gone)
                continue
            asked = self._next()
            if asked is None:
                break
            try:
                pipe.send(asked.question)
                reply = parcel.receive(pipe)
            except (EOFError, OSError) as gone:
                pipe.close()
                pipe = None
                self._lost(number)
                words = f"a worker died ({_words(gone)})"
                error = WorkerGoneError(words, at_work=not self._closed)
                self._settle(asked.name, _Reply(None, error, 0.0))
            except Exception as unreadable:  # a question or an answer that no pipe takes
                self._settle(asked.name, _Reply(None, unreadable, 0.0))
            else:
                self._settle(asked.name, reply)
        if pipe is not None:
            pipe.close()

    def _not_started(self, gone: BaseException) -> None:
        """Try again, or after many times fail the next question first: each costs one attempt."""
        with self._changed:
            self._stillborn += not self._closed
        if self.starts or self._closed:
            return
        error = WorkerGoneError(f"a worker did not start ({_words(gone)})")
        log.warning("%s", error)
        asked = self._next()
        if asked is not None:
            self._settle(asked.name, _Reply(None, error, 0.0))

    def _next(self) -> _Asked | None:
        """What waits first; None once there is nothing to do any more."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return None if self._closed else self._waiting.popleft()

    def _start(self, number: int) -> Connection:
        """The pipe to a new worker that is there. Raises EOFError or OSError."""
        context = get_context("spawn")
        ours, its = context.Pipe()
        arguments = (its, pickle.dumps(self._opener), self._niceness)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        its.close()
        with self._changed:
            self._processes[number] = process
            if self._closed:
                process.kill()
        try:
            failure = ours.recv()
        except (EOFError, OSError):
            ours.close()
            raise
        if failure is not None:
            ours.close()
            raise OSError(failure)
        with self._changed:
            self._up.add(number)
            self._stillborn = 0
        return ours

    def _lost(self, number: int) -> None:
        with self._changed:
            self._up.discard(number)

    def _settle(self, name: Hashable, reply: _Reply) -> None:
        with self._changed:
            future = self._asked.pop(name, None)
            if isinstance(reply.error, WorkerGoneError):
                self._died += 1
            elif reply.error is None:
                self._died = 0
                self.busy_s += reply.seconds
        if future is None:
            return
        if reply.error is None:
            future.set_result(reply.answer)
        else:
            future.set_exception(reply.error)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _work(pipe: Connection, opener: bytes, niceness: int) -> None:
    """A worker: answers what it is asked, and ends when its parent does, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(niceness)  # who waits for an answer goes first
    try:
        handle = pickle.loads(opener)()
    except Exception as error:  # of a machine, a model folder: no question is to blame
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    parent = parent_process()
    assert parent is not None and parent.pid is not None
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        reply = _reply(handle, question)
        try:
            parcel.send(pipe, parent.pid, reply)
        except (pickle.PicklingError, TypeError, AttributeError) as error:  # before a byte was sent
            parcel.send(pipe, parent.pid, _Reply(None, RuntimeError(str(error)), reply.seconds))


def _reply(handle: Callable[[Any], Any], question: object) -> _Reply:
    start = time.perf_counter()
    try:
        answer = handle(question)
    except Exception as error:  # the parent raises it
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # one with arguments of its own
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return _Reply(None, error, time.perf_counter() - start)
    return _Reply(answer, None, time.perf_counter() - start)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
