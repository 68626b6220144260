"""Commands as they are typed: what reaches the code behind them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands.doctor import examine
from avatar_rl.cluster.commands.runs import stoppable
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import resolve_recipe
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.workers.pool import unwrap
from avatar_rl.cluster.workers.rollout_fleet import DESIRED
from avatar_rl.cluster.workers.weight_road import weight_transport
from avatar_rl.common.errors import ConfigError, ResourceError

DATA: dict[str, Any] = {"data": {"train": "train.jsonl"}}


def test_scale_reaches_a_run_by_its_folder_and_by_its_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "toy-1"
    with (
        EmbeddedRedis(tmp_path / "redis") as server,
        ReplayBuffer.connect(BufferConfig(), "toy-1", server.url) as buffer,
    ):
        folder = RunFolder(run, on_warning=print)
        folder.config(RunConfig.model_validate(DATA).model_dump(mode="json"))
        folder.status(state="training")
        assert main(["scale", str(run), "--rollout-workers", "3", "--url", server.url]) == 0
        assert buffer.control.desired(DESIRED) == 3
        asked = ["--folder", str(run.parent), "--rollout-workers", "2", "--url", server.url]
        assert main(["scale", "toy-1", *asked]) == 0
        assert buffer.control.desired(DESIRED) == 2
        assert "3 -> 2 desired" in capsys.readouterr().out
        assert main(["scale", "toy-2", *asked]) == 1
        assert "not a run folder" in capsys.readouterr().err
        folder.close()


def test_an_empty_mapping_empties_and_another_is_merged() -> None:
    raw: dict[str, Any] = DATA | {
        "resources": {"learner_labels": {"pool": "learner"}},
        "loop": {"steps": 7},
    }
    empty = resolve_recipe(raw, [("resources.learner_labels", "{}")], source="here")
    assert empty.resources.learner_labels == {}
    merged = resolve_recipe(
        raw, [("resources.learner_labels", "{zone: a}"), ("loop", "{fresh: 2}")], source="here"
    )
    assert merged.resources.learner_labels == {"pool": "learner", "zone": "a"}
    assert (merged.loop.steps, merged.loop.fresh) == (7, 2)


def test_an_engine_over_several_gpus_asks_ray_for_them() -> None:
    split = DATA | {"rollout": {"engine": {"tensor_parallel_size": 2}}}
    with pytest.raises(ConfigError, match=r"needs resources\.rollout_gpus 2, which is None"):
        resolve_recipe(split, [], source="here")
    resolve_recipe({**split, "resources": {"rollout_gpus": 2}}, [], source="here")


def test_a_transport_that_the_machine_lacks_is_refused_with_another() -> None:
    def refused(match: str, **keys: object) -> None:
        with pytest.raises(ConfigError, match=match):
            resolve_recipe(DATA | keys, [], source="here")

    nccl = {"transport": "nccl"}
    on_cpu = {"engine": {"device": "cpu"}}
    refused("nccl goes from GPU to GPU, .* set it to gloo", weights=nccl, rollout=on_cpu)
    refused("nccl goes from GPU to GPU", weights=nccl, resources={"learner_gpus": 0})
    refused(r"set resources\.colocate to true", weights={"transport": "ipc"})
    seldom = {"transport": "gloo", "board_every": 3}
    refused(r"with loop\.max_staleness 1 set it to 2", weights=seldom)
    resolve_recipe(DATA | {"weights": seldom, "loop": {"max_staleness": 2}}, [], source="here")
    pool = {"pool": {"every": 1}}
    refused(r"set weights\.board_every to 1", weights=seldom | {"board_every": 2}, evaluation=pool)
    refused("weights.transport", weights={"transport": "carrier pigeon"})
    resolve_recipe(DATA | {"weights": nccl}, [], source="here")
    for asked, on_gpu, expected in (
        ("auto", False, "board"),
        ("auto", True, "nccl"),
        ("gloo", False, "gloo"),
        ("nccl", True, "nccl"),
    ):
        config = resolve_recipe(DATA | {"weights": {"transport": asked}}, [], source="here")
        assert weight_transport(config, Path("unused"), on_gpu=on_gpu)[0] == expected
    config = resolve_recipe(DATA | {"weights": nccl}, [], source="here")
    with pytest.raises(ConfigError, match="nccl goes from GPU to GPU"):
        weight_transport(config, Path("unused"), on_gpu=False)


def test_the_doctor_takes_overrides_and_curricula_and_misses_storage(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            DATA | {"resources": {"address": "auto"}, "buffer": {"url": "redis://127.0.0.1:9"}}
        )
    )
    missing = f"/nowhere-{time.time_ns()}/runs"
    found = {item.subject: item for item in examine(recipe, [("output.folder", missing)])}
    assert found["output.folder"].level == "fail" and "mounted" in found["output.folder"].remedy
    assert found["recipe"].level == "ok"
    curriculum = Path(__file__).parents[2] / "recipes" / "curriculum_local.yaml"
    assert next(item for item in examine(curriculum) if item.subject == "recipe").level == "ok"


def test_gpu_memory_that_ran_out_is_told_with_what_to_lower() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    error: Any = RuntimeError(
        "Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    error.cause = OutOfMemoryError("CUDA out of memory")
    told = unwrap(error)
    assert (
        isinstance(told, ResourceError)
        and "learner.micro_batch_tokens" in str(told)
        and "2.00 GiB" in str(told)
    )


def test_an_order_to_stop_that_ray_passes_on_as_an_interrupt_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise KeyboardInterrupt  # as a call that waits in Ray does

    assert stoppable(work) == 0 and "--resume auto" in capsys.readouterr().err

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stoppable(interrupted)
