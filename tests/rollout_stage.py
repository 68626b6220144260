"""A rollout actor on real Redis, reward actors and engine, for the integration tests of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from avatar_rl.actors.rollout import RolloutActor
from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import prepare_base_model, prepare_datasets
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.workers.pool import Pool, rollout_spec
from avatar_rl.prompts.datasets import load_prompts, media_base
from avatar_rl.prompts.record import resolve_uri
from tests.tiny_models import respawn

BROKEN = "train-00007"
DEADLINE_S = 40.0
_runs = count()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S:g} s"
        time.sleep(0.01)


class Stage:
    """Services and one actor in this process; every test gets a run of its own in Redis.
    ``engine``: further settings of its engine."""

    def __init__(self, folder: Path, **engine: Any) -> None:
        settings: dict[str, Any] = {
            "data": {
                "synthetic": {"n_train": 8, "n_heldout": 4, "n_sft": 0},
                "template": {"min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 256},
            },
            "rollout": {
                "max_sequences": 16,
                "engine": {
                    "max_model_len": 320,
                    "max_num_seqs": 16,
                    "kv_cache_memory_bytes": 64 << 20,
                    **engine,
                },
                "sampling": {"max_tokens": 24},
            },
            "output": {"cache": folder / "cache"},
        }
        self.config = RunConfig.model_validate(settings)
        self.services = Services(self.config, folder)
        self.services.__enter__()
        self.datasets = datasets = prepare_datasets(self.config, lambda *_: None)
        self.model = prepare_base_model(self.config, lambda *_: None)
        self.weights = respawn(self.model, folder / "second", seed=1)
        for prompt in load_prompts(datasets.train, self.config.data.reader):
            if prompt.id == BROKEN:
                base = media_base(datasets.train, self.config.data.reader)
                resolve_uri(prompt.media.items[0].uri, base).write_bytes(b"not a clip")
        self.pool = Pool(self.config, self.services)
        self.pool.start_scorers(datasets.asked)
        self.spec = rollout_spec(
            self.config, "first", self.model, datasets, self.services.redis_url
        )
        # As the driver does: an actor does not begin a run.
        ReplayBuffer.connect(self.config.buffer, "first", self.services.redis_url).close()
        self.actor = RolloutActor(
            "rollout-0", self.spec, self.pool.scorers[0], self.pool.weight_store
        )

    def begin(self) -> ReplayBuffer:
        """A new run without contents, for the actor and for the test."""
        name = f"run-{next(_runs)}"
        self.actor.buffer.close()
        self.actor.buffer = ReplayBuffer.connect(self.config.buffer, name, self.services.redis_url)
        self.actor.spec, self.actor.scorer = replace(self.spec, run_id=name), self.pool.scorers[0]
        return ReplayBuffer.connect(self.config.buffer, name, self.services.redis_url)

    def fixed_length(self, tokens: int) -> None:
        sampling = self.spec.sampling.model_copy(update={"max_tokens": tokens, "ignore_eos": True})
        self.actor.spec = replace(self.actor.spec, sampling=sampling)

    def close(self) -> None:
        self.actor.engine.close()
        self.services.stop()


@contextmanager
def working(actor: RolloutActor) -> Iterator[Future[dict[str, Any]]]:
    """The actor runs in a thread; leaving stops it and raises what broke it."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(actor.run)
        try:
            yield running
        finally:
            if not running.done():
                actor.stop()
        running.result(DEADLINE_S)


def train(prompts: list[int], *, n: int = 4, first: int = 0, step: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(seq=first + i, prompt_id=f"train-{p:05d}", step=step, n=n)
        for i, p in enumerate(prompts)
    ]


def arrived(buffer: ReplayBuffer, step: int = 0) -> list[Group]:
    """The step's groups once all are in."""
    groups: list[Group] = []

    def ready() -> bool:
        share = buffer.replay.lease_fresh("test", step)
        groups[:] = share.groups
        return share.ready

    until(ready, f"arrival of step {step}")
    return groups


def members(groups: list[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def tokens(groups: list[Group]) -> list[list[int]]:
    return [trajectory.token_ids.tolist() for trajectory in members(groups)]
