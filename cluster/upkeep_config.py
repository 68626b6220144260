"""Sections of a recipe that say where a run lives and how it is kept alive: machines, output,
checkpoints, supervision, the probe at start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from avatar_rl.common.config import Section


class MachineConfig(Section):
    """The machine that a recipe is written for, by node. The dry run and the start hold the plan
    of processes and memory against it."""

    nodes: int = Field(1, ge=1, description="Nodes, alike.")
    gpus: int = Field(8, ge=0, description="GPUs of a node.")
    gpu_gib: float = Field(79.6, gt=0, description="Memory of a GPU as nvidia-smi tells, in GiB.")
    cpus: int = Field(64, ge=1, description="Cores of a node.")
    memory_gib: float = Field(900, gt=0, description="Memory of a node, in GiB.")
    shm_gib: float = Field(
        100, gt=0, description="/dev/shm of a node, in GiB: Ray's object store lies there."
    )


class ResourceConfig(Section):
    """What is asked of Ray."""

    address: str | None = Field(
        None, description="Ray cluster to join ('auto' or host:port); null runs on this machine."
    )
    machine: MachineConfig | None = Field(
        None,
        description="The machine that the recipe is written for; null: whatever the run finds.",
    )
    rollout_cpus: float = Field(1, gt=0, description="CPUs per rollout actor.")
    rollout_gpus: float | None = Field(
        None, ge=0, description="GPUs per rollout actor; null: 1 where GPUs exist."
    )
    learner_cpus: float = Field(1, gt=0, description="CPUs per learner rank.")
    learner_gpus: float | None = Field(
        None, ge=0, description="GPUs per learner rank; null: 1 where GPUs exist."
    )
    colocate: bool = Field(
        False,
        description="Rollout actors and learner ranks share GPUs and alternate: engines generate "
        "the step and sleep, ranks train it and leave the GPU (docs/one-gpu.md). One GPU is "
        "enough; needs loop.max_staleness 0 and rollout.engine.kv_cache_memory_bytes.",
    )
    learner_strict: bool = Field(
        False, description="All learner ranks on one node or not at all; else packed."
    )
    learner_labels: dict[str, str] = Field(
        {}, description="Node labels that learner ranks ask for."
    )
    rollout_labels: dict[str, str] = Field(
        {}, description="Node labels that rollout actors ask for."
    )
    rollout_resources: dict[str, float] = Field(
        {}, description="Custom Ray resources per rollout actor."
    )
    reward_workers: int = Field(1, ge=1, description="Reward actors.")
    object_store_bytes: int = Field(
        256 << 20, ge=80 << 20, description="Ray object store of a local run, in bytes."
    )
    start_timeout_s: float = Field(
        300, gt=0, description="Deadline for actors to be placed and ready."
    )


class OutputConfig(Section):
    """What the run leaves behind."""

    folder: Path = Field(Path("runs"), description="Parent of the run folders.")
    cache: Path = Field(
        Path("build/cache"),
        description="Synthetic worlds, tiny models and cold starts, by content.",
    )
    samples_every: int = Field(
        10, ge=0, description="Steps between saved rollout samples; 0 saves none."
    )
    samples: int = Field(
        4,
        ge=1,
        description="Groups per saved sample; those with the most different rewards are taken.",
    )
    samples_mib: int = Field(
        256,
        ge=1,
        description="MiB that samples/ may take; then the oldest make room, but for the first.",
    )
    export: bool = Field(
        True, description="Write the trained policy as a Hugging Face checkpoint at the end."
    )
    report: bool = Field(True, description="Write plot.png and report.html at the end.")
    upload: str | None = Field(
        None,
        description="fsspec URL (s3://bucket/path, file:///mnt/x) the run folder is copied to at "
        "the end.",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"], ...] = Field(
        ("tensorboard",),
        description="Where metrics, settings and samples go beside the run folder, whose "
        "TensorBoard files are always there. Each needs its package, avatar-rl[wandb] and so on; "
        "one that cannot be reached costs a warning.",
    )
    project: str = Field("avatar-rl", description="Project or experiment of the trackers.")
    tracker_media: bool = Field(
        False,
        description="Send clips of up to 4 MiB with the samples, to trackers that show them (W&B). "
        "File names go along in any case.",
    )
    metric_names: Literal["ours", "trl", "verl"] = Field(
        "ours",
        description="Trackers also get the metrics under TRL's or verl's names (docs/output.md).",
    )
    prometheus_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port that serves the run's metrics to Prometheus; null serves none.",
    )
    prometheus_host: str = Field(
        "127.0.0.1", description="Address it listens on; 0.0.0.0 for another host to scrape."
    )


class CheckpointConfig(Section):
    """What survives the job, and what survives a learner (docs/survival.md)."""

    ALIASES: ClassVar[Mapping[str, str]] = {"hold_bytes": "replica_bytes"}

    every: int = Field(
        20,
        ge=0,
        description="Steps between checkpoints; 0 writes none, then nothing can be resumed.",
    )
    keep: int = Field(2, ge=1, description="Checkpoints kept; older ones are removed.")
    replica_bytes: int = Field(
        1 << 30,
        ge=0,
        description="A learner state up to this size is copied to another process at every step, "
        "so that a dead rank costs no step. Above it the run goes back to its last checkpoint. 0: "
        "always the checkpoint.",
    )


class SupervisionConfig(Section):
    """When a process counts as dead, and how often it is replaced."""

    stall_s: float = Field(
        120,
        gt=0,
        description="A rollout actor without progress for this long while it holds prompts is "
        "replaced; keep it above the time of the longest group. A judge's deadline is added.",
    )
    learner_stall_s: float = Field(
        600,
        gt=0,
        description="Learner ranks that train and get nowhere for this long are replaced; keep it "
        "above the time of the slowest micro-batch, and of the optimizer's step and the gathering "
        "of the weights.",
    )
    start_stall_s: float = Field(
        120,
        gt=0,
        description="An actor or learner rank that starts and gives no sign of life for this long "
        "is replaced; it gives one every second, also while it imports and loads.",
    )
    restarts: int = Field(
        8,
        ge=0,
        description="Deaths of one kind of process between two finished steps before the run "
        "stops; rollout actors may each die once more.",
    )
    quarantine_limit: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of the prompts asked so far that may be set aside (too long, unreadable "
        "media ...) before the run ends; counts from 32 such prompts on.",
    )
    grace_s: float = Field(25, ge=0, description="Seconds a SIGTERM leaves for a last checkpoint.")


class ProbeConfig(Section):
    """The parity probe: rollout and learner must agree about tokens and log-probabilities before
    training."""

    prompts: int = Field(
        4, ge=0, description="Prompts probed at start; 0: neither then nor after each step."
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Allowed log-probability difference of 99 in 100 tokens; any prompt's average "
        "may be a quarter of it; null: 1e-4 in float32, 0.3 in bfloat16.",
    )
