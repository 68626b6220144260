"""Configuration of the replay buffer service."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr, model_validator

from avatar_rl.common.config import Section
from avatar_rl.common.errors import ConfigError

Strategy = Literal["stratified", "same_prompt", "uniform", "recent", "priority", "magnitude"]
#: Those that draw by stored advantages, and with replacement.
BY_ADVANTAGE = ("priority", "magnitude")
AppendFsync = Literal["always", "everysec", "no"]

#: Seconds that a consumer may hold work without renewing, where it does not say.
DEFAULT_LEASE_S = 120.0


class WeightsConfig(Section):
    """How a policy version travels from learner to rollout actors (docs/architecture.md)."""

    transport: Literal["board", "nccl", "gloo", "ipc", "auto"] = Field(
        "board",
        description="board: through the weight store, by Ray's object store; the road of joiners, "
        "of adapters and of whatever cannot use another. nccl: broadcast from GPU to GPUs. ipc: "
        "CUDA IPC, where learner and engine share a GPU. gloo: the protocol of nccl on CPUs. auto: "
        "ipc where the GPUs are shared, nccl where both sides have their own, else board.",
    )
    board_every: int = Field(
        1,
        ge=1,
        description="With another transport: every n-th version is on the board, too, for actors "
        "that join between two versions. At most loop.max_staleness + 1.",
    )

    def faults(
        self, *, lacks_gpus: bool, colocated: bool, max_staleness: int, measures_pool: bool
    ) -> Iterator[str]:
        """What speaks against this way in a recipe. ``lacks_gpus``: it says so of one side;
        ``measures_pool``: an evaluation waits for the newest version."""
        if self.transport in ("nccl", "ipc") and lacks_gpus:
            yield (
                f"weights.transport {self.transport} goes from GPU to GPU, and learner or rollouts "
                "have none here: set it to gloo, which is the same protocol on CPUs, or to board"
            )
        if self.transport == "ipc" and not colocated:
            yield (
                "weights.transport ipc shares the memory of one GPU, and learner and rollouts have "
                "their own here: set resources.colocate to true, or weights.transport to nccl"
            )
        if self.transport == "nccl" and colocated:
            yield (
                "weights.transport nccl cannot go from a GPU to itself: with resources.colocate "
                "set it to ipc"
            )
        if self.transport != "board" and self.board_every > max_staleness + 1:
            yield (
                f"weights.board_every {self.board_every} leaves an actor that joins without work: "
                f"with loop.max_staleness {max_staleness} set it to {max_staleness + 1} or less"
            )
        if self.board_every > 1 and measures_pool:
            yield (
                "evaluation.pool waits for answers of the newest version, also from an actor that "
                "just joined: set weights.board_every to 1"
            )


class TierShares(Section):
    """Fixed share of the capacity each tier may hold (docs/method.md 1.3)."""

    easy: float = Field(
        0.25, ge=0, le=1, description="Share of the capacity for trajectories of Easy prompts."
    )
    medium: float = Field(
        0.35, ge=0, le=1, description="Share of the capacity for trajectories of Medium prompts."
    )
    hard: float = Field(
        0.40, ge=0, le=1, description="Share of the capacity for trajectories of Hard prompts."
    )

    @model_validator(mode="after")
    def _check(self) -> TierShares:
        if abs(self.easy + self.medium + self.hard - 1) > 1e-9:
            raise ValueError(
                f"tier shares sum to {self.easy + self.medium + self.hard}, they must sum to 1"
            )
        return self


class HintGateConfig(Section):
    """When a prompt's pre-computed hint comes on (docs/method.md 1.4)."""

    enabled: bool = Field(True, description="Whether hints may fire at all.")
    hard_patience: int = Field(
        3, ge=1, description="Consecutive visits a prompt must end in Hard before KL counts."
    )
    kl_below: float = Field(
        0.01,
        ge=0,
        description="A prompt's own mean k3 KL to the behaviour policy below which it is stuck.",
    )
    zero_patience: int = Field(
        3, ge=1, description="Consecutive visits with zero accuracy that fire it on their own."
    )
    accuracy_component: str = Field(
        "accuracy", description="Reward component whose zeros are counted."
    )


class BufferConfig(Section):
    """Where the buffer lives, how much it keeps and how it is drawn from."""

    REMOVED: ClassVar[Mapping[str, str]] = {
        "lease_s": "set rollout.lease_s for rollout actors and learner.lease_s for learner ranks"
    }

    url: str | None = Field(
        None, description="URL: redis://, rediss:// or unix://; none starts an embedded server."
    )
    username: str | None = Field(None, description="ACL user; none logs in as the default user.")
    password_env: str | None = Field(
        None, description="Name of the environment variable that holds the password."
    )
    password_file: Path | None = Field(
        None, description="File that holds the password, as an alternative."
    )
    tls_ca: Path | None = Field(
        None, description="CA bundle for a rediss:// URL; none takes the system's."
    )
    reconnect_s: float = Field(
        30.0, gt=0, description="How long a call keeps retrying while Redis is away."
    )
    pause_s: float = Field(
        600.0,
        ge=0,
        description="How long the run pauses while Redis has no room (memory or disk full) before "
        "it ends.",
    )
    timeout_s: float = Field(10.0, gt=0, description="How long one command may take on the wire.")
    memory_limit: float = Field(
        0.9, gt=0, le=1, description="Share of maxmemory above which inserts are refused."
    )
    appendfsync: AppendFsync = Field(
        "everysec", description="Embedded server: how much a kill -9 of Redis may lose."
    )
    capacity: int = Field(10_000, ge=4, description="Trajectories kept for replay.")
    tier_shares: TierShares = Field(
        TierShares(), description="How the capacity is split over the tiers."
    )
    quantile_low: float = Field(
        0.40, gt=0, lt=1, description="Prompts up to this quantile of Rbar are Hard."
    )
    quantile_high: float = Field(
        0.75, gt=0, lt=1, description="Prompts up to this quantile of Rbar are Medium."
    )
    window: int = Field(
        20, ge=1, description="On-policy rewards in the moving average of a prompt."
    )
    warm_up: int = Field(
        128, ge=0, description="Replay starts once this many trajectories are stored."
    )
    max_reuse: int = Field(
        0, ge=0, description="Steps a trajectory may be replayed in; 0 means no limit."
    )
    max_age_versions: int = Field(
        0, ge=0, description="Policy versions after which a trajectory goes; 0: no limit."
    )
    strategy: Strategy = Field(
        "stratified",
        description="How replays are chosen; priority: stratified, but within a tier by stored "
        "advantage and with replacement (docs/method.md 1.6); magnitude: over all tiers by the "
        "size of the stored advantage, with replacement.",
    )
    priority_temperature: float = Field(
        1.0,
        ge=0.05,
        description="Of strategy priority: weights are exp(advantage / temperature).",
    )
    priority_half_life: float = Field(
        0.0,
        ge=0,
        description="Of strategies priority and magnitude: policy versions of age with which a "
        "weight halves; 0: age does not count.",
    )
    reward_diverse: bool = Field(
        False, description="Prefer as many successes as failures among the replays."
    )
    quota_block: int = Field(
        4, ge=1, description="Draws are split over the tiers in blocks of this size, 1/1/2 of 4."
    )
    success_at: float = Field(
        0.5, description="Accuracy (or reward, when masked) from which a trajectory is a success."
    )
    hints: HintGateConfig = Field(HintGateConfig(), description="Gate of the pre-computed hints.")

    @property
    def room_in_one_tier(self) -> int:
        """Trajectories that are kept of a pool that lies in the Hard tier as a whole."""
        return self.capacities()[2]

    @model_validator(mode="after")
    def _check(self) -> BufferConfig:
        if self.quantile_low >= self.quantile_high:
            raise ValueError(
                f"quantile_low {self.quantile_low} must be below quantile_high {self.quantile_high}"
            )
        if self.warm_up > self.capacity:
            raise ValueError(
                f"warm_up {self.warm_up} is above capacity {self.capacity}: replay would never "
                "start"
            )
        room = self.room_in_one_tier
        if self.warm_up > room:
            raise ValueError(
                f"warm_up {self.warm_up} is above the {room} trajectories of one tier (capacity "
                f"{self.capacity}, tier_shares): while no prompt is solved all are Hard, and "
                f"replay would never start. Lower warm_up to {room}, or raise capacity"
            )
        if self.password_env and self.password_file:
            raise ValueError("password_env and password_file are both set: keep one")
        if self.strategy == "recent" and self.reward_diverse:
            raise ValueError(
                "reward_diverse has no meaning for strategy recent: turn one of them off"
            )
        if self.strategy in BY_ADVANTAGE and (self.reward_diverse or self.max_reuse):
            raise ValueError(
                f"strategy {self.strategy} draws with replacement and by advantage alone: leave "
                "reward_diverse off and max_reuse 0"
            )
        if self.priority_half_life and self.strategy not in BY_ADVANTAGE:
            raise ValueError(
                f"priority_half_life says nothing to strategy {self.strategy}: set strategy to "
                f"{' or '.join(BY_ADVANTAGE)}, or priority_half_life to 0"
            )
        return self

    def password(self) -> SecretStr | None:
        """The password from its variable or file. Raises ConfigError naming the one that is
        missing."""
        if self.password_env:
            if self.password_env not in os.environ:
                raise ConfigError(
                    f"buffer.password_env: variable {self.password_env} is not set; export it"
                )
            return SecretStr(os.environ[self.password_env])
        if self.password_file:
            if not self.password_file.is_file():
                raise ConfigError(
                    f"buffer.password_file: {self.password_file} is missing; create it or unset "
                    "the key"
                )
            return SecretStr(self.password_file.read_text().strip())
        return None

    def capacities(self) -> tuple[int, int, int]:
        """(easy, medium, hard) trajectories; the rounding rest goes to Hard."""
        easy, medium = (
            int(self.capacity * self.tier_shares.easy),
            int(self.capacity * self.tier_shares.medium),
        )
        return easy, medium, self.capacity - easy - medium

    def server_rules(self) -> dict[str, float]:
        """The settings every client of a run must share; the scripts read them from Redis."""
        easy, medium, hard = self.capacities()
        return {
            "cap_easy": easy,
            "cap_medium": medium,
            "cap_hard": hard,
            "q_low": self.quantile_low,
            "q_high": self.quantile_high,
            "window": self.window,
            "warm_up": self.warm_up,
            "max_reuse": self.max_reuse,
            "max_age": self.max_age_versions,
            "block": self.quota_block,
            "block_easy": self.tier_shares.easy,
            "block_medium": self.tier_shares.medium,
            "hints": int(self.hints.enabled),
            "hard_patience": self.hints.hard_patience,
            "kl_below": self.hints.kl_below,
            "zero_patience": self.hints.zero_patience,
        }
