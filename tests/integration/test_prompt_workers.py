"""Media of rollouts prepared in other processes: the same prompts, groups and faults as without."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from avatar_rl.actors.config import EngineConfig
from avatar_rl.actors.engine.launch import engine_arguments, prepare_environment
from avatar_rl.actors.engine.rendering import rendered_by, renderer_of
from avatar_rl.actors.prompt_workers import PromptWorkers, PromptWorkerSpec
from avatar_rl.common.errors import DataError
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import MediaItem, MediaPlan, ProblemType, Prompt
from avatar_rl.prompts.workers.pool import WorkerPool
from tests.rollout_stage import BROKEN, Stage, arrived, tokens, train, working
from tests.tiny_models import build_vision_language
from tests.unit.media_files import write_video

#: A worker imports vLLM, on a machine that may be busy.
WAIT_S = 240.0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("workers")
    stage = Stage(folder, media_workers=1, prompt_cache_bytes=0)
    yield stage
    stage.close()


@pytest.mark.timeout(900)  # two workers start, one after the other
def test_groups_are_those_of_an_actor_without_workers_whatever_becomes_of_one(
    stage: Stage,
) -> None:
    actor, asked = stage.actor, [0, 1, int(BROKEN[-2:]), 2]
    workers = actor.workers
    assert workers is not None
    actor.workers = None
    with stage.begin() as buffer:
        buffer.requests.push(train(asked))
        with working(actor):
            plain = arrived(buffer)
        reason = buffer.requests.quarantined()[BROKEN]
    actor.workers = workers
    with stage.begin() as buffer:
        with working(actor):
            wait_for(lambda: workers.up)
            spent = workers.busy_s
            buffer.requests.push(train(asked[:2]))
            wait_for(lambda: buffer.stats.check_ledger().generated == 2)
            assert workers.busy_s > spent
            [pid] = workers.pids
            worker = psutil.Process(pid)
            os.kill(pid, signal.SIGKILL)
            buffer.requests.push(train(asked[2:], first=2))
            wait_for(lambda: buffer.stats.check_ledger().generated == 4)
            [another] = [psutil.Process(pid) for pid in workers.pids]
            groups = arrived(buffer)
        assert buffer.requests.quarantined() == {BROKEN: reason}
    assert tokens(groups) == tokens(plain) and [group.seq for group in groups] == [0, 1, 3]
    assert another != worker and not worker.is_running() and not another.is_running()


def test_an_actor_that_drains_gives_back_what_is_with_a_worker(stage: Stage) -> None:
    actor = stage.actor
    assert actor.workers is not None
    with stage.begin() as buffer:
        with working(actor) as running:
            wait_for(lambda: actor.workers is not None and actor.workers.up)
            [pid] = actor.workers.pids
            os.kill(pid, signal.SIGSTOP)  # it will not answer
            buffer.requests.push(train([0, 1, 2]))
            wait_for(lambda: len(actor.state.held) == 3)
            actor.drain()
            running.result(WAIT_S)
        assert not psutil.pid_exists(pid)
        again = buffer.requests.lease("other", 12, lease_s=60, max_staleness=1)
        assert [lease.request.seq for lease in again] == [0, 1, 2]


# -- what comes back -------------------------------------------------------------------------------


def clip_prompt(name: str, uri: Path, **fields: Any) -> Prompt:
    item = MediaItem(kind="video", uri=str(uri), frames=4, **fields)
    return Prompt(
        id=name,
        question="how many red",
        answer="1",
        problem_type=ProblemType.FREE_FORM,
        hint="look left",
        media=MediaPlan(items=(item,)),
    )


def settings_of(model: Path, kind: str) -> bytes:
    """``RolloutEngine.settings`` without starting an engine."""
    config = EngineConfig(device="cpu", max_model_len=512, max_num_seqs=4)
    prepare_environment(config, "cpu")
    from vllm import EngineArgs

    arguments = engine_arguments(model, kind, config, "cpu")
    return pickle.dumps(EngineArgs(**arguments).create_engine_config())


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_worker_prepares_what_the_engine_would(kind: str, tmp_path: Path) -> None:
    model = build_vision_language(tmp_path / "model", kind)
    clip = write_video(tmp_path / "a.mp4", [(200, 30, 10), (20, 200, 10)] * 8)
    (tmp_path / "b.mp4").write_bytes(b"no clip")
    template = TemplateConfig(min_pixels=784, max_pixels=50176)
    spec = PromptWorkerSpec(model, MediaConfig(), template, settings_of(model, kind))
    workers = PromptWorkers(spec, 1)
    workers.start()
    try:
        whole = clip_prompt("whole", clip)
        part = clip_prompt("whole", clip, clip=(0.5, 1.5))
        made = workers.ask({"": whole, "video": part}, hinted=True).result(WAIT_S)
        with pytest.raises(DataError, match=r"b\.mp4"):
            workers.ask({"": clip_prompt("b", tmp_path / "b.mp4")}, hinted=False).result(WAIT_S)
    finally:
        workers.close()
    encoder = PromptEncoder(model, MediaLoader(MediaConfig(), Path(".")), template)
    renderer = renderer_of(spec.engine)
    assert list(made) == ["", "video"]
    for name, prompt in (("", whole), ("video", part)):
        own: Any = rendered_by(renderer, encoder.engine_input(prompt, True), "own")
        found: Any = made[name][0]
        assert found["prompt_token_ids"] == own["prompt_token_ids"]
        assert found["mm_hashes"] == own["mm_hashes"]
        assert found["mm_placeholders"] == own["mm_placeholders"]
        [mine], [its] = own["mm_kwargs"]["video"], found["mm_kwargs"]["video"]
        assert mine.keys() == its.keys()
        for key in mine:
            assert torch.equal(torch.as_tensor(mine[key].data), torch.as_tensor(its[key].data))


# -- whose fault -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails:
    """Opens a worker that dies over one prompt."""

    prompt_id: str

    def __call__(self) -> Callable[[Any], Any]:
        return self.prepare

    def prepare(self, asked: Any) -> Any:
        if asked.prompt_id == self.prompt_id:
            os._exit(9)
        return {part: asked.prompt_id for part, _ in asked.parts}


def test_a_prompt_over_which_workers_keep_dying_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "avatar_rl.actors.prompt_workers.WorkerPool",
        lambda opener, count: WorkerPool(Fails("monster"), count),
    )
    spec = PromptWorkerSpec(tmp_path, MediaConfig(), TemplateConfig(), b"")
    workers = PromptWorkers(spec, 1)
    workers.start()
    try:
        monster = workers.ask({"": clip_prompt("monster", tmp_path)}, hinted=False)
        fine = workers.ask({"": clip_prompt("fine", tmp_path)}, hinted=False)
        assert fine.result(WAIT_S) == {"": "fine"}
        with pytest.raises(DataError, match=r"'monster': 3 worker processes died over its media"):
            monster.result(WAIT_S)
        later = workers.ask({"": clip_prompt("later", tmp_path)}, hinted=False)
        assert later.result(WAIT_S) == {"": "later"}
    finally:
        workers.close()
    assert workers.pids == [] and not workers.up
