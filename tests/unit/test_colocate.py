"""Engine and learner on one device (resources.colocate): what is refused, planned and ordered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import JsonValue

from avatar_rl.actors.engine.launch import GPU_BATCHED_TOKENS
from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands import doctor_plan, train
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe import memory
from avatar_rl.cluster.recipe.gpus import Gpu
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.recipe.memory import (
    BATCHED_TOKENS,
    GIB,
    SHARED_RESERVE,
    MemoryPlan,
    leaves_device,
)
from avatar_rl.cluster.recipe.resources import asked_by
from avatar_rl.cluster.services import services
from avatar_rl.cluster.training.loop import await_answers
from avatar_rl.cluster.workers.turns import SharedDevice
from avatar_rl.common.errors import ConfigError, ReplayBufferError, ResourceError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "gpu" / "omni_3b_1gpu_lora.yaml"
FINE: dict[str, dict[str, Any]] = {
    "data": {"synthetic": {}},
    "loop": {"max_staleness": 0},
    "rollout": {"engine": {"kv_cache_memory_bytes": 1 << 26}},
    "resources": {"colocate": True},
}


def colocated(**change: dict[str, JsonValue]) -> RunConfig:
    merged = {name: {**FINE.get(name, {}), **change.get(name, {})} for name in {**FINE, **change}}
    return RunConfig.model_validate(merged)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loop": {"max_staleness": 2}}, "loop.max_staleness 2 lets .* set it to 0"),
        ({"resources": {"machine": {"nodes": 2}}}, "for one node, and resources.machine has 2"),
        ({"rollout": {"engine": {}}}, "needs rollout.engine.kv_cache_memory_bytes"),
        ({"rollout": {"autoscale": True, "max_workers": 1}}, "cannot scale: leave"),
        ({"rollout": {"max_workers": 3}}, "cannot scale: leave"),
        ({"resources": {"rollout_gpus": 0.4}}, "leave resources.rollout_gpus 0.4 out"),
        ({"resources": {"learner_gpus": 1}}, "leave resources.learner_gpus 1 out"),
        ({"resources": {"rollout_labels": {"pool": "a"}}}, "leave resources.rollout_labels out"),
        (
            {
                "rollout": {
                    "engine": {"kv_cache_memory_bytes": 1 << 26, "tensor_parallel_size": 2}
                },
                "resources": {"rollout_gpus": 2},
            },
            "an engine over several GPUs cannot share them",
        ),
    ],
)
def test_what_cannot_be_colocated_is_refused_with_the_remedy(
    change: dict[str, dict[str, JsonValue]], said: str
) -> None:
    assert colocated().resources.colocate
    with pytest.raises(ValueError, match=said):
        colocated(**change)


def test_actor_and_rank_need_one_gpu_together() -> None:
    needs = asked_by(colocated()).on_gpu()
    assert needs.gpus == 1 and (needs.rollout_gpus, needs.learner_gpus) == (0.5, 0.5)
    wide = asked_by(colocated(rollout={"workers": 3}, learner={"ranks": 2})).on_gpu()
    assert wide.gpus == 3
    assert asked_by(colocated(resources={"rollout_gpus": 0, "learner_gpus": 0})).on_gpu().gpus == 0


def one_gpu(gib: int) -> Any:
    return lambda: ([Gpu("H100", gib * GIB, 590)], "")


def plan_of(**overrides: str) -> MemoryPlan:
    named = [(name.replace("__", "."), value) for name, value in overrides.items()]
    plan = MemoryPlan.of(load_recipe(RECIPE, named))
    assert plan is not None
    return plan


def test_the_plan_of_a_shared_gpu_is_the_sum_of_both_sides() -> None:
    plan = plan_of()
    both, engine = plan.generating(leaves=False), plan.generating(leaves=True)
    assert BATCHED_TOKENS == GPU_BATCHED_TOKENS
    assert both["keys and values"] == 16 * GIB and both["engine's weights"] == plan.weights
    stays = plan.learner_stays
    assert both["learner"] == sum(stays.values()) > stays["weights"] == plan.weights
    assert engine["learner"] == 0  # no media workers
    assert plan.training.items() >= plan.learner_parts.items()
    edge = sum(both.values()) + SHARED_RESERVE
    assert not plan.leaves(edge) and plan.leaves(edge - 1)
    assert plan.misfits(80 * GIB) == []


def test_a_gpu_that_is_too_small_is_named_with_what_to_change() -> None:
    [said] = plan_of(rollout__engine__kv_cache_memory_bytes=str(70 * GIB)).misfits(80 * GIB)
    assert "keys and values 70.0" in said and "lower rollout.engine.kv_cache_memory_bytes" in said
    [said] = plan_of(rollout__engine__kv_cache_memory_bytes=str(GIB // 2)).misfits(80 * GIB)
    assert "is below one longest sequence, 0.6 GiB at max_model_len 16384" in said
    [said] = plan_of(learner__lora="null").misfits(60 * GIB)
    assert "training takes" in said and "train an adapter (learner.lora)" in said
    generating, training = plan_of().misfits(16 * GIB)
    assert "the model is too large for this GPU" in generating and "training takes" in training


def test_a_dry_run_says_whether_the_gpu_here_is_large_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train", str(RECIPE), "--dry-run"]
    assert main(asked) == 0
    assert "shared GPU, generating" in capsys.readouterr().out
    monkeypatch.setattr(train, "local_gpus", one_gpu(80))
    assert main(asked) == 0
    assert "it fits into the GPU here" in capsys.readouterr().out
    monkeypatch.setattr(train, "local_gpus", one_gpu(24))
    assert main(asked) == 1
    shown = capsys.readouterr()
    assert "shared GPU, training" in shown.out and "H100 is too small for this recipe" in shown.err


def test_the_start_refuses_such_a_gpu_and_the_learner_leaves_a_middling_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_plan, "flavour", lambda: "gpu")
    config = load_recipe(RECIPE)
    for gib, level in ((80, "ok"), (24, "fail")):
        monkeypatch.setattr(doctor_plan, "local_gpus", one_gpu(gib))
        [finding] = doctor_plan.gpu(config)
        assert finding.level == level, finding
    for gib, leaves in ((80, False), (40, True)):
        monkeypatch.setattr(memory, "local_gpus", one_gpu(gib))
        assert leaves_device(config) is leaves
    assert leaves_device(colocated())  # nobody knows how large it is


def test_more_actors_than_gpus_and_too_large_a_cache_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_plan, "flavour", lambda: "gpu")
    monkeypatch.setattr(doctor_plan, "local_gpus", one_gpu(80))
    [finding] = doctor_plan.gpu(load_recipe(RECIPE, [("rollout.workers", "2")]))
    assert "the recipe needs 2 GPUs, here are 1 (H100)" in finding.found
    monkeypatch.setattr(doctor_plan, "local_gpus", lambda: ([], "no nvidia-smi"))
    huge = colocated(rollout={"engine": {"kv_cache_memory_bytes": 1 << 50}})
    assert (
        "memory are free"
        in {item.subject: item for item in doctor_plan.memory(huge)}[
            "rollout.engine.kv_cache_memory_bytes"
        ].found
    )


def test_a_cluster_of_several_nodes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "live_nodes", lambda: [{}, {}])
    with pytest.raises(ResourceError, match="is for one node, and the cluster has 2"):
        services.Services(colocated(), tmp_path)._check_cluster()


class Side:
    """A fleet or a learner that says what is asked of it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def begin_turn(self, look: Any) -> None:
        self.said.append(f"{self.name} begins")

    def end_turn(self, look: Any) -> None:
        self.said.append(f"{self.name} ends")


def test_a_side_begins_when_the_other_has_ended_and_only_where_it_is_not_its_turn() -> None:
    said: list[str] = []
    fleet: Any = Side("fleet", said)
    learner: Any = Side("learner", said)
    turns = SharedDevice(fleet, learner)
    turns.learner()
    assert said == []
    for _ in range(2):
        turns.rollouts()
    assert said == ["learner ends", "fleet begins"]
    for _ in range(2):
        turns.learner()
    assert said[2:] == ["fleet ends", "learner begins"]
    assert turns.metrics()["time/turns"] > 0 and turns.metrics()["time/turns"] == 0


def test_the_engines_turn_lasts_until_everything_is_answered() -> None:
    left = [3, 2, 2, 0]
    looks: list[str] = []
    run: Any = SimpleNamespace(
        config=SimpleNamespace(loop=SimpleNamespace(step_timeout_s=60)),
        buffer=SimpleNamespace(requests=SimpleNamespace(unsettled=lambda: left.pop(0))),
        fleet=SimpleNamespace(watch=lambda wait: looks.append("fleet")),
        supervisor=SimpleNamespace(look=lambda: looks.append("look")),
    )
    await_answers(run, 0)
    assert left == [] and looks == ["fleet", "look"] * 3
    left, run.config.loop.step_timeout_s = [5] * 9, -1
    with pytest.raises(ReplayBufferError, match="step 7: 5 requests were not answered"):
        await_answers(run, 7)


def test_a_colocated_run_cannot_be_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from avatar_rl.cluster.commands import scale

    (tmp_path / "config.yaml").write_text("resources: {colocate: true}\nrollout: {}\nbuffer: {}\n")
    status = SimpleNamespace(lost=False, state="training", run_id="r")
    monkeypatch.setattr(scale, "read_status", lambda folder: status)
    with pytest.raises(ConfigError, match="r is colocated"):
        scale.scale(tmp_path, 2)
