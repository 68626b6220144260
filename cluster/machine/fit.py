"""A recipe held against the machine that it is written for (resources.machine): processes, GPU and
host memory of the fullest node."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import read_recipe
from avatar_rl.cluster.recipe.memory import GIB, SHARED_RESERVE, MemoryPlan
from avatar_rl.cluster.recipe.overlays import value_at
from avatar_rl.cluster.recipe.resources import Needs, asked_by, cluster_address
from avatar_rl.cluster.upkeep_config import MachineConfig
from avatar_rl.common.errors import AvatarError, ConfigError

#: Of a GPU: NCCL's buffers, CUDA graphs and the allocator's gaps, which no plan counts.
RESERVE = 10 * GIB
#: Of a rollout GPU: what vLLM takes while it runs a step, beside weights and keys and values.
ENGINE_RESERVE = 6 * GIB


@dataclass(frozen=True)
class Demand:
    """Something that the run needs and the machine has, in ``unit``."""

    what: str
    needed: float
    has: float
    unit: str = "GiB"
    exact: bool = False  # all of it is to be used
    key: str = ""  # what to change where it does not fit
    note: str = ""

    @property
    def fits(self) -> bool:
        return self.needed <= self.has

    def words(self) -> str:
        """One line of the dry run."""
        digits = 1 if self.unit == "GiB" else 0
        unit = f" {self.unit}" if self.unit else ""
        said = f"{self.needed:.{digits}f} of {self.has:.{digits}f}{unit}"
        if not self.fits:
            said += f"   TOO LITTLE: change {self.key}"
        elif self.exact and self.needed < self.has:
            said += f"   {self.has - self.needed:.0f} idle"
        return said + (f"   {self.note}" if self.note else "")


@dataclass(frozen=True)
class NodeLoad:
    """Processes of one kind of node."""

    name: str
    learners: int
    rollouts: int
    has_first_rank: bool


def node_loads(config: RunConfig, machine: MachineConfig, needs: Needs) -> list[NodeLoad]:
    """The fullest node of each kind: of the whole run where that has one node."""
    if machine.nodes == 1:
        return [NodeLoad("node", needs.learners, needs.rollouts, True)]
    learners = min(needs.learners, _room(machine.gpus, needs.learner_gpus))
    rollouts = min(needs.rollouts, _room(machine.gpus, needs.rollout_gpus))
    return [
        NodeLoad("learner node", learners, 0, True),
        NodeLoad("rollout node", 0, rollouts, False),
    ]


def _room(gpus: int, each: float) -> int:
    """Processes that a node's GPUs hold."""
    return max(1, math.floor(gpus / each)) if each else 1 << 30


def demands(config: RunConfig) -> list[Demand]:
    """What the recipe needs of its machine; empty where it names none."""
    machine = config.resources.machine
    if machine is None:
        return []
    return [*_processes(config, machine), *_memory(config, machine)]


def machine_words(machine: MachineConfig) -> str:
    """The machine in a line."""
    nodes = "one node" if machine.nodes == 1 else f"{machine.nodes} nodes, each"
    gpus = "1 GPU" if machine.gpus == 1 else f"{machine.gpus} GPUs"
    return (
        f"{nodes} of {gpus} of {machine.gpu_gib:g} GiB, {machine.cpus} cores, "
        f"{machine.memory_gib:g} GiB of memory, {machine.shm_gib:g} GiB in /dev/shm"
    )


def _processes(config: RunConfig, machine: MachineConfig) -> Iterator[Demand]:
    needs = asked_by(config)
    if needs.colocated:
        needs = needs.on_gpu()
    key = "learner.ranks, rollout.workers or resources.*_gpus"
    if needs.gpus:
        yield Demand("GPUs", needs.gpus, machine.nodes * machine.gpus, "", exact=True, key=key)
    if machine.nodes > 1 and needs.gpus:
        nodes = sum(
            math.ceil(count / _room(machine.gpus, each))
            for count, each in (
                (needs.learners, needs.learner_gpus),
                (needs.rollouts, needs.rollout_gpus),
            )
        )
        yield Demand("nodes", nodes, machine.nodes, "", exact=True, key=key)
    for load in node_loads(config, machine, needs):
        cpus = load.learners * needs.learner_cpus + load.rollouts * needs.rollout_cpus
        key = "resources.*_cpus"
        yield Demand(f"cores, {load.name}", cpus, machine.cpus, "", key=key)


def _memory(config: RunConfig, machine: MachineConfig) -> Iterator[Demand]:
    plan, needs = MemoryPlan.of(config), asked_by(config)
    if plan is None:
        return
    gpu = machine.gpu_gib
    if needs.colocated:
        yield from _shared_gpu(plan, gpu)
    if needs.learner_gpus:
        spare = gpu - plan.learner_gpu / GIB
        note = "" if spare >= RESERVE / GIB else "leaves under 10 GiB for NCCL and CUDA graphs"
        key = "learner.ranks, optimizer.zero_stage, micro_batch_tokens or lora"
        yield Demand("learner GPU", plan.learner_gpu / GIB, gpu, key=key, note=note)
    if needs.rollout_gpus:
        share = gpu * config.rollout.engine.gpu_memory_utilization
        key = "rollout.engine.tensor_parallel_size, max_model_len or gpu_memory_utilization"
        note = f"keys and values of {_cached_tokens(plan, share) // 1000}k tokens"
        needed = (plan.rollout_gpu + ENGINE_RESERVE) / GIB
        yield Demand("rollout GPU", needed, share, key=key, note=note)
    store = plan.object_store
    for load in node_loads(config, machine, needs):
        host = (
            load.learners * sum(plan.learner_host.values())
            + load.rollouts * sum(plan.rollout_host.values())
            + (plan.published if load.has_first_rank else 0)
            + store
        )
        key = "learner.ranks, rollout.workers or the caches"
        yield Demand(f"memory, {load.name}", host / GIB, machine.memory_gib, key=key)
    if cluster_address(config) is None:
        asked = config.resources.object_store_bytes
        key = "resources.object_store_bytes"
        yield Demand("object store, versions", store / GIB, asked / GIB, key=key)
        yield Demand("/dev/shm, object store", asked / GIB, machine.shm_gib, key=key)
    else:
        yield Demand("/dev/shm, versions", store / GIB, machine.shm_gib, key="the size of /dev/shm")


def _shared_gpu(plan: MemoryPlan, gpu: float) -> Iterator[Demand]:
    """Of a GPU of ``gpu`` GiB that engine and learner have by turns."""
    leaves = plan.leaves(gpu * GIB)
    generating = sum(plan.generating(leaves=leaves).values()) + SHARED_RESERVE
    training = sum(plan.training.values()) + SHARED_RESERVE
    note = "the learner is in host memory meanwhile" if leaves else "the learner stays"
    key = "rollout.engine.kv_cache_memory_bytes"
    yield Demand("shared GPU, generating", generating / GIB, gpu, key=key, note=note)
    key = "learner.lora, optimizer.offload_optimizer or micro_batch_tokens"
    yield Demand("shared GPU, training", training / GIB, gpu, key=key)


def _cached_tokens(plan: MemoryPlan, share_gib: float) -> int:
    """Tokens whose keys and values an engine holds on all its GPUs."""
    split = plan.config.rollout.engine.tensor_parallel_size
    free = share_gib * GIB - plan.weights / split - ENGINE_RESERVE
    return max(0, int(free * split / plan.model.cache_bytes(1)))


def learner_nodes(recipe: Path, gpus: int) -> int:
    """Nodes of ``gpus`` GPUs that a recipe's learner ranks fill, for the script of Slurm."""
    raw = read_recipe(recipe)
    ranks, each = value_at(raw, "learner.ranks") or 1, value_at(raw, "resources.learner_gpus") or 1
    if not isinstance(ranks, int) or not isinstance(each, int | float):
        raise ConfigError(f"recipe {recipe}: learner.ranks and resources.learner_gpus are numbers")
    return math.ceil(ranks / _room(gpus, each))


if __name__ == "__main__":  # RECIPE GPUS
    try:
        print(learner_nodes(Path(sys.argv[1]), int(sys.argv[2])))
    except AvatarError as error:
        sys.exit(f"avatar: {error}")
