"""Workers' logs reach the run folder by role, through a real Ray, while they run."""

from __future__ import annotations

import time
from pathlib import Path

from avatar_rl.cluster.recipe.load import check
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.workers.pool import Pool


class Chatty:
    """An actor that says whose its log is, as rollout actors and learner ranks do."""

    def __init__(self, role: str) -> None:
        from avatar_rl.common.process import name_log

        name_log(role)

    def say(self, text: str) -> None:
        print(text, flush=True)


def test_what_a_worker_prints_is_there_at_once_and_its_last_words_too(tmp_path: Path) -> None:
    import ray

    config = check({"data": {"train": "x"}}, source="test")
    logs = tmp_path / "logs"
    with Services(config, tmp_path) as services:
        pool = Pool(config, services)  # with a weight store that says nothing
        actor = pool.actor_class(Chatty, cpus=0.1).remote("learner-0")
        ray.get(actor.say.remote("step 1"))
        deadline = time.monotonic() + 20
        while not (logs / "learner-0.log").is_file():
            assert time.monotonic() < deadline, list(tmp_path.rglob("*"))
            time.sleep(0.2)
        assert (logs / "learner-0.log").read_text().splitlines()[1:] == ["step 1"]
        ray.get(actor.say.remote("last words"))
    assert (logs / "learner-0.log").read_text().splitlines()[1:] == ["step 1", "last words"]
    assert [file.name for file in logs.iterdir()] == ["learner-0.log"]
