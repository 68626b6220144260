"""Worker processes: what comes back from them, and what their death costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from avatar_rl.common.errors import DataError, InputError
from avatar_rl.prompts.workers.pool import WorkerGoneError, WorkerPool

WAIT_S = 60.0


class Odd(Exception):
    """Does not survive pickling: its constructor takes two arguments, its ``args`` hold one."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what + why)


def opener() -> Callable[[str], Any]:
    return handle


def handle(question: str) -> Any:
    word, _, rest = question.partition(" ")
    if word == "die":
        os._exit(9)
    if word == "sleep":
        time.sleep(float(rest))
    if word == "broken":
        raise InputError("a.mp4", "is cut short", "fetch it again")
    if word == "odd":
        raise Odd("one", "two")
    if word == "unsendable":
        return lambda: None
    if word == "large":
        return {"pixels": torch.arange(1 << 18, dtype=torch.float32).view(2, -1), "word": rest}
    return f"{question}!"


def refuses() -> Callable[[str], Any]:
    raise RuntimeError("no such model")


@pytest.fixture
def pool() -> Iterator[WorkerPool[str, Any]]:
    made: WorkerPool[str, Any] = WorkerPool(opener, 1)
    yield made
    made.close()
    assert made.pids == []


def ask(pool: WorkerPool[str, Any], question: str) -> Any:
    return pool.ask(question, question).result(WAIT_S)


def test_answers_errors_and_large_tensors_come_back(pool: WorkerPool[str, Any]) -> None:
    assert ask(pool, "hello") == "hello!"
    large = ask(pool, "large x")
    assert large["word"] == "x" and large["pixels"].shape == (2, 1 << 17)
    assert torch.equal(large["pixels"].view(-1), torch.arange(1 << 18, dtype=torch.float32))
    with pytest.raises(DataError, match=r"a\.mp4: is cut short; fetch it again"):
        ask(pool, "broken")
    with pytest.raises(RuntimeError, match="Odd: onetwo"):
        ask(pool, "odd")
    with pytest.raises(RuntimeError, match="pickle"):
        ask(pool, "unsendable")
    assert ask(pool, "again") == "again!" and pool.busy_s > 0
    large["pixels"] += 1  # memory of this process, which a worker's death does not take along
    os.kill(pool.pids[0], signal.SIGKILL)
    assert large["pixels"][0, 0] == 1


def test_a_worker_that_dies_is_replaced(pool: WorkerPool[str, Any]) -> None:
    assert ask(pool, "hello") == "hello!"
    [first] = pool.pids
    waits = pool.ask("sleep", "sleep 0.2"), pool.ask("die", "die 1"), pool.ask("after", "after")
    assert waits[0].result(WAIT_S) == "sleep 0.2!"
    with pytest.raises(WorkerGoneError) as gone:
        waits[1].result(WAIT_S)
    assert gone.value.at_work
    assert waits[2].result(WAIT_S) == "after!" and pool.alive and pool.starts
    assert pool.pids != [first]


def test_asking_twice_is_asking_once_and_the_first_goes_first(pool: WorkerPool[str, Any]) -> None:
    done: list[str] = []

    def note(name: str, **how: bool) -> None:
        pool.ask(name, f"sleep 0.1 {name}"[:9], **how).add_done_callback(
            lambda _: done.append(name)
        )

    for name in ("a", "b", "c"):
        note(name)
    assert pool.ask("b", "sleep 0.1") is pool.ask("b", "other")
    note("c", first=True)
    note("d", first=True)
    deadline = time.monotonic() + WAIT_S
    while len(done) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert done.index("d") < done.index("b") and done.index("c") < done.index("b")


def test_workers_that_never_start_are_given_up() -> None:
    pool: WorkerPool[str, Any] = WorkerPool(refuses, 1)
    try:
        pool.start()
        deadline = time.monotonic() + WAIT_S
        while pool.starts:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not pool.up
        with pytest.raises(WorkerGoneError, match=r"did not start .*no such model") as gone:
            ask(pool, "hello")
        assert not gone.value.at_work
    finally:
        pool.close()


def test_closing_ends_workers_at_work_and_fails_what_they_were_asked() -> None:
    pool: WorkerPool[str, Any] = WorkerPool(opener, 2)
    assert ask(pool, "hello") == "hello!"
    waits = [pool.ask(n, "sleep 60") for n in range(4)]
    processes = [psutil.Process(pid) for pid in pool.pids]
    pool.close()
    for wait in (*waits, pool.ask("late", "late")):
        with pytest.raises(WorkerGoneError, match="ended"):
            wait.result(0)
    assert processes and not any(process.is_running() for process in processes)


PARENT = """
import sys
from tests.integration.test_worker_pool import WorkerPool, opener
if __name__ == "__main__":
    pool = WorkerPool(opener, 2)
    pool.start()
    pool.ask("a", "hello").result()
    pool.ask("b", "sleep 60"), pool.ask("c", "sleep 60")
    while len(pool.pids) < 2:
        pass
    print(*pool.pids, flush=True)
    sys.stdin.readline()
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    _, left = psutil.wait_procs(workers, timeout=20)
    assert left == []
