"""The feeder with worker processes: what it hands out, in which order groups come back, and whose
fault a failure is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from avatar_rl.actors.feeder import Feeder
from avatar_rl.actors.shared_state import SharedState
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.common.errors import DataError
from avatar_rl.prompts.record import MediaItem, MediaPlan, ProblemType, Prompt
from avatar_rl.prompts.workers.pool import WorkerGoneError

WAIT_S = 10.0


def prompt(name: str, *kinds: str, hint: str | None = None) -> Prompt:
    items = tuple(MediaItem(kind=kind, uri=f"{name}.mp4") for kind in kinds)  # type: ignore[arg-type]
    return Prompt(
        id=name,
        question="how many",
        answer="1",
        problem_type=ProblemType.FREE_FORM,
        hint=hint,
        media=MediaPlan(items=items),
    )


class Workers:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.up = True
        self.asked: dict[str, tuple[Mapping[str, Prompt], bool, Future[Any]]] = {}

    def ask(self, parts: Mapping[str, Prompt], *, hinted: bool) -> Future[Any]:
        future: Future[Any] = Future()
        [name] = {one.id for one in parts.values()}
        self.asked[name] = (parts, hinted, future)
        return future

    def finish(self, name: str, error: Exception | None = None) -> None:
        parts, _, future = self.asked[name]
        if error is not None:
            future.set_exception(error)
        else:
            made = {part: rendered(f"{name}/{part} of a worker") for part in parts}
            future.set_result({part: (one, {"hash": name}) for part, one in made.items()})


def rendered(what: str) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": [1, 2, 3], "prompt": what}


class Stage:
    """A feeder over prompts, with an engine and an encoder that do nothing."""

    def __init__(self, *prompts: Prompt, unimodal: bool = False) -> None:
        self.cache: dict[Any, Any] = {}
        self.here: list[str] = []  # prepared in the feeder's own thread
        self.refused: dict[str, str] = {}
        self.released: list[RequestLease] = []
        self.state, self.workers = SharedState(), Workers()
        engine = SimpleNamespace(
            prepared=self.cache.get,
            prepare=self.prepare,
            keep=self.keep,
            in_flight=0,
            stored=None,
        )
        requests = SimpleNamespace(lease=lambda *_, **__: [], release=self.released.extend)
        encoder = SimpleNamespace(
            engine_input=lambda prompt, hinted: prompt.id,
            check_length=self.check,
            chat=SimpleNamespace(opened_tag=""),
        )
        spec = SimpleNamespace(
            unimodal=unimodal, confidence=False, max_sequences=64, lease_s=60.0, max_staleness=1
        )
        self.feeder = Feeder(
            "a",
            spec,  # type: ignore[arg-type]
            SimpleNamespace(requests=requests),  # type: ignore[arg-type]
            {one.id: one for one in prompts},  # type: ignore[arg-type]
            encoder,  # type: ignore[arg-type]
            engine,  # type: ignore[arg-type]
            self.state,
            lambda lease, error: self.refused.update({lease.request.prompt_id: str(error)}),
            self.workers,  # type: ignore[arg-type]
        )

    def prepare(self, engine_input: Any, name: str, key: Any) -> Any:
        self.here.append(name)
        return self.cache.setdefault(key, rendered(f"{name} made here"))

    def keep(self, key: Any, made: Any) -> Any:
        self.cache[key] = made
        return made

    def check(self, prompt: Prompt, tokens: int) -> None:
        if "long" in prompt.id:
            raise DataError(f"{prompt.id} has too many tokens")

    def lease(self, name: str, step: int = 0, *, hinted: bool = False) -> None:
        seq = len(self.state.held)
        request = RolloutRequest(seq=seq, prompt_id=name, step=step, n=2)
        lease = RequestLease(request=request, attempt=1, consumer="a", hinted=hinted)
        self.feeder.prepare(self.state.hold([lease]))

    @property
    def ready(self) -> list[str]:
        """What has been prepared, after the feeder looked again."""
        self.feeder.prepare([])
        return [group.prompt.id for group in self.state.ready]


@pytest.fixture
def stage() -> Stage:
    clips = (prompt(name, "video") for name in ("a", "b", "c", "d", "too long"))
    return Stage(*clips, prompt("text"))


def test_a_group_passes_others_of_its_step_and_none_of_an_earlier_one(stage: Stage) -> None:
    for name, step in (("a", 3), ("b", 3), ("c", 4), ("d", 3)):
        stage.lease(name, step)
    assert stage.ready == [] and stage.here == []
    stage.workers.finish("c")
    assert stage.ready == []  # of a later step
    stage.workers.finish("d")
    assert stage.ready == ["d"]
    stage.workers.finish("b")
    assert stage.ready == ["d", "b"]
    stage.workers.finish("a")
    assert stage.ready == ["d", "b", "a", "c"]
    made = stage.state.ready[0].prepared[""]
    assert made["prompt"] == "d/ of a worker"  # type: ignore[typeddict-item]


def test_what_is_in_the_cache_or_has_no_media_asks_no_worker(stage: Stage) -> None:
    stage.lease("text")
    assert stage.ready == ["text"] and stage.here == ["text"]
    stage.lease("a")
    stage.workers.finish("a")
    assert stage.ready == ["text", "a"]
    stage.workers.asked.clear()
    stage.lease("a")
    assert stage.ready == ["text", "a", "a"] and stage.workers.asked == {}


def test_before_the_first_worker_is_up_the_actor_prepares_itself(stage: Stage) -> None:
    stage.workers.up = False
    stage.lease("a")
    assert stage.ready == ["a"] and stage.here == ["a"] and stage.workers.asked == {}


def test_a_prompts_own_fault_sets_it_aside_and_a_workers_fault_does_not(stage: Stage) -> None:
    for name in ("a", "b", "c", "too long"):
        stage.lease(name)
    stage.workers.finish("a", DataError("a.mp4: no frames"))
    stage.workers.finish("b", WorkerGoneError("a worker did not start"))
    stage.workers.finish("c", RuntimeError("of torch"))
    stage.workers.finish("too long")
    assert stage.ready == ["b", "c"] and stage.here == ["b", "c"]
    assert stage.refused == {
        "a": "a.mp4: no frames",
        "too long": "too long has too many tokens",
    }


def test_parts_of_a_prompt_go_to_one_worker_and_come_back_in_order() -> None:
    stage = Stage(prompt("p", "video", "audio", hint="look left"), unimodal=True)
    stage.cache[("p", True, "audio")] = rendered("from the cache")
    stage.lease("p", hinted=True)
    parts, hinted, _ = stage.workers.asked["p"]
    assert hinted and list(parts) == ["", "video"]  # the third is there
    assert [item.kind for item in parts["video"].media.items] == ["video"]
    stage.workers.finish("p")
    assert stage.ready == ["p"]
    assert list(stage.state.ready[0].prepared) == ["", "video", "audio"]


def test_names_of_stored_media_are_noted_and_media_fetched_before_a_group_is_ready(
    stage: Stage,
) -> None:
    seen: list[Any] = []
    stage.feeder.engine.stored = SimpleNamespace(  # type: ignore[assignment]
        note=lambda names: seen.append(names), fetch=lambda one: seen.append(one["prompt"])
    )
    stage.lease("a")
    stage.workers.finish("a")
    assert stage.ready == ["a"] and seen == [{"hash": "a"}, "a/ of a worker"]
    stage.lease("a")  # from the cache; its names are known
    assert stage.ready == ["a", "a"] and seen[2:] == ["a/ of a worker"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_worker_wakes_the_feeder_and_draining_gives_back_what_has_not_begun(
    stage: Stage,
) -> None:
    for name in ("a", "b"):
        stage.lease(name)
    thread = threading.Thread(target=stage.feeder.run)
    thread.start()
    try:
        stage.workers.finish("b")
        until(lambda: len(stage.state.ready) == 1)
    finally:
        stage.state.drain.set()
        stage.state.wake.set()
        thread.join(WAIT_S)
    assert [lease.request.prompt_id for lease in stage.released] == ["a"]
    assert len(stage.state.held) == 1  # b's, which is ready


def test_what_workers_have_counts_as_room_that_is_taken(stage: Stage) -> None:
    asked: list[int] = []
    requests = stage.feeder.buffer.requests
    requests.lease = lambda name, room, **_: asked.append(room) or []  # type: ignore[method-assign,assignment,func-returns-value]
    for name in ("a", "b", "c"):
        stage.lease(name)
    thread = threading.Thread(target=stage.feeder.run)
    thread.start()
    until(lambda: bool(asked))
    stage.state.stop.set()
    stage.state.wake.set()
    thread.join(WAIT_S)
    assert asked[0] == 64 + 32 - 3 * 2
    assert stage.released == []  # a stop leaves that to the actor
