"""What `avatar doctor` and the start of a run say of GPUs, memory and disk, by the plan of the
recipe's model (recipe/memory.py)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from avatar_rl.cluster.commands.doctor_machine import flavour
from avatar_rl.cluster.commands.findings import Finding, Level, gib
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.machine.fit import demands
from avatar_rl.cluster.recipe.gpus import Gpu, local_gpus
from avatar_rl.cluster.recipe.memory import (
    BOARD_VERSIONS,
    PROCESS_BYTES,
    SHARED_RESERVE,
    MemoryPlan,
)
from avatar_rl.cluster.recipe.resources import Needs, asked_by, cluster_address, needs_of
from avatar_rl.common.errors import ResourceError

DRIVER = 580  # the oldest for the CUDA 13 that the pinned stack is built with
#: A model from this size on is not trained without GPUs.
LARGE = 2e9
SHM_REMEDY = (
    "lower resources.object_store_bytes, or enlarge it: docker run --shm-size=16g, or an emptyDir "
    "with medium: Memory at /dev/shm"
)


def gpus_asked(plan: MemoryPlan, needs: Needs) -> str:
    """The GPUs that a run asks for, in words."""
    if needs.colocated:
        turns = (plan.generating(leaves=True), plan.training)
        least = max(sum(parts.values()) for parts in turns) + SHARED_RESERVE
        return f"{needs.gpus:g} shared GPUs of {gib(least)} each at least ({plan.model.name})"
    return (
        f"{needs.gpus:g} GPUs: {needs.learners} learner ranks x {needs.learner_gpus:g} with "
        f"{gib(plan.learner_gpu)} each at least, {needs.rollouts} rollout actors x "
        f"{needs.rollout_gpus:g} with {gib(plan.rollout_gpu)} ({plan.model.name})"
    )


def machine(config: RunConfig | None) -> Iterator[Finding]:
    """What does not fit the machine that the recipe is written for."""
    for demand in demands(config) if config is not None else ():
        if not demand.fits:
            yield Finding(
                "resources.machine",
                "fail",
                f"{demand.what}: {demand.needed:.1f} {demand.unit} needed, it has "
                f"{demand.has:.1f}".replace("  ", " "),
                f"change {demand.key}, or correct resources.machine",
            )


def cpus(config: RunConfig | None) -> Iterator[Finding]:
    """Cores of this machine for a local run."""
    if config is None or cluster_address(config) is not None:
        return
    try:
        yield Finding("CPU", "ok", f"{os.cpu_count()} cores for {needs_of(config).cpus:g} asked")
    except ResourceError as error:
        yield Finding("CPU", "fail", str(error), "or use a larger machine")


def gpu(config: RunConfig | None) -> Iterator[Finding]:
    """Count, memory and driver. Those of a cluster are its nodes' (doctor_network.py)."""
    have, why = local_gpus()
    plan = MemoryPlan.of(config)
    if config is not None and cluster_address(config) is not None:
        return
    if have and flavour() == "cpu":
        yield Finding(
            "GPU",
            "warn",
            f"{len(have)} GPU(s), but the CPU stack is installed",
            "make setup on this machine",
        )
        return
    needs = asked_by(config) if config is not None else None
    if not have:
        yield _none_here(plan, needs, why)
        return
    faults = list(_too_small(have, plan, needs.on_gpu() if needs is not None else None))
    old = min(have, key=lambda item: item.driver)
    if old.driver < DRIVER:
        faults.append(f"driver {old.driver}, but CUDA 13 needs {DRIVER} or newer")
    if faults:
        yield Finding(
            "GPU",
            "fail",
            "; ".join(faults),
            "install a newer driver, use more or larger GPUs, or lower learner.ranks, "
            "rollout.workers or resources.*_gpus",
        )
    else:
        yield Finding("GPU", "ok", f"{len(have)}: {have[0].name}, driver {old.driver}")


def _none_here(plan: MemoryPlan | None, needs: Needs | None, why: str) -> Finding:
    is_large = plan is not None and plan.model.parameters >= LARGE
    if needs is None or not (needs.gpus or is_large):
        return Finding("GPU", "ok", f"none here ({why}): CPU mode")
    wanted = f"{needs.on_gpu().gpus:g} GPUs"
    if plan is not None:
        wanted = gpus_asked(plan, needs.on_gpu())
    remedy = "install the driver, join a cluster that has them (resources.address)"
    return Finding(
        "GPU",
        "fail",
        f"none here ({why}), and the recipe needs {wanted}",
        remedy if is_large else f"{remedy}, or set resources.*_gpus to 0",
    )


def _too_small(have: list[Gpu], plan: MemoryPlan | None, needs: Needs | None) -> Iterator[str]:
    if needs is None:
        return
    if needs.gpus > len(have):
        yield f"the recipe needs {needs.gpus:g} GPUs, here are {len(have)} ({have[0].name})"
    smallest = min(item.bytes for item in have)
    if plan is None:
        return
    if needs.colocated:
        yield from plan.misfits(smallest)
        return
    for what, wanted, gpus in (
        ("a learner rank", plan.learner_gpu, needs.learner_gpus),
        ("a rollout actor", plan.rollout_gpu, needs.rollout_gpus),
    ):
        room = smallest * min(1.0, gpus)
        if gpus and wanted > room:
            yield f"{what} of {plan.model.name} needs {gib(wanted)} of a GPU, there are {gib(room)}"


def memory(config: RunConfig | None) -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    plan = MemoryPlan.of(config)
    on_cpus = not local_gpus()[0] and (plan is None or plan.model.parameters < LARGE)
    if config is not None and on_cpus and cluster_address(config) is None:
        yield from _caches(config, free)
    remedy = "fewer rollout.workers or learner.ranks, or stop other programs"
    if plan is not None and config is not None:
        address, have_gpus = cluster_address(config), bool(local_gpus()[0])
        what = f"weights of {plan.model.name} in the object store"
        needed = plan.host
        if address is None and not have_gpus:
            needed, what = plan.without_gpus, f"{plan.model.name} without GPUs, in float32"
        if address is not None:
            yield Finding(
                "memory",
                "ok" if free >= needed else "warn",
                f"{gib(free)} free here; the nodes need {gib(needed)} together for {what}, "
                "beside their processes",
                "" if free >= needed else "see docs/cluster.md for what each node needs",
            )
            return
        level: Level = "ok" if free >= needed else "fail"
        found = f"{gib(free)} free, {gib(needed)} needed for {what}"
        yield Finding("memory", level, found, "" if level == "ok" else f"a smaller model, {remedy}")
        return
    processes = config.rollout.workers + config.learner.ranks if config is not None else 2
    if config is not None and cluster_address(config) is not None:
        processes = 2  # driver and what it starts
    needed = processes * PROCESS_BYTES
    level = "ok" if free >= needed else "warn"
    yield Finding(
        "memory",
        level,
        f"{gib(free)} free, {processes} processes need {gib(needed)} with a tiny model",
        "" if level == "ok" else remedy,
    )


def _caches(config: RunConfig, free: int) -> Iterator[Finding]:
    """Keys and values of engines on a CPU, whose bytes the recipe names."""
    rollout = config.rollout
    asked = (rollout.engine.kv_cache_memory_bytes or 0) * rollout.workers
    if asked > free:
        yield Finding(
            "rollout.engine.kv_cache_memory_bytes",
            "fail",
            f"{rollout.workers} engines take {gib(asked)}, {gib(free)} of memory are free",
            "lower it, or rollout.workers",
        )


def shm(config: RunConfig | None) -> Iterator[Finding]:
    """/dev/shm holds the object store of a local run; without room Ray takes the slower TMPDIR."""
    usage = shutil.disk_usage("/dev/shm")
    found = f"{gib(usage.free)} of {gib(usage.total)} free"
    if config is None or cluster_address(config) is not None:
        yield Finding("/dev/shm", "ok", found)
        return
    asked, plan = config.resources.object_store_bytes, MemoryPlan.of(config)
    needed = plan.object_store if plan is not None else 0
    if usage.free < asked:
        slow = shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free
        level: Level = "warn" if slow >= asked else "fail"
        what = f"{found}, resources.object_store_bytes asks for {gib(asked)}"
        yield Finding("/dev/shm", level, what, SHM_REMEDY)
    elif plan is not None and asked < needed:
        yield Finding(
            "/dev/shm",
            "fail",
            f"resources.object_store_bytes is {gib(asked)}, but {BOARD_VERSIONS} versions of the "
            f"weights of {plan.model.name} take {gib(needed)}",
            f"set resources.object_store_bytes to {int(needed)} or more",
        )
    else:
        yield Finding("/dev/shm", "ok", f"{found}, the object store takes {gib(asked)}")


def disk(config: RunConfig | None) -> Iterator[Finding]:
    """``checkpoint.keep`` checkpoints, the next one before the oldest goes, and the export."""
    plan = MemoryPlan.of(config)
    if config is None or plan is None:
        return
    count = config.checkpoint.keep + 1 if config.checkpoint.every else 0
    export = plan.weights if config.output.export else 0
    needed = count * plan.checkpoint + export
    path = config.output.folder.absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    found = (
        f"{gib(free)} free at {nearest}, {count} checkpoints of {plan.model.name} and the export "
        f"take {gib(needed)}"
    )
    if cluster_address(config) is not None and nearest == Path(path.anchor):
        return  # its storage is not here, which output.folder says
    remedy = "free some space, set output.folder to a larger disk, or lower checkpoint.keep"
    level: Level = "ok" if free >= needed else "fail"
    yield Finding("disk", level, found, "" if level == "ok" else remedy)
