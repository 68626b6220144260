"""What a rollout actor is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avatar_rl.actors.config import EngineConfig, SamplingConfig
from avatar_rl.actors.groups import DeadBy
from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig


@dataclass(frozen=True)
class StoreSpec:
    """The learner's store of embeddings, as a rollout actor opens it."""

    folder: Path | None  # None: the default of the node
    bytes: int
    dtype: str  # of the learner's towers


@dataclass(frozen=True)
class RolloutSpec:
    """All that a rollout actor needs to know; plain data, sent once."""

    run_id: str
    seed: int
    model: Path
    datasets: tuple[Path, ...]
    data: DataConfig
    media: MediaConfig
    template: TemplateConfig
    engine: EngineConfig
    sampling: SamplingConfig
    evaluation_tokens: int | None
    buffer: BufferConfig
    redis_url: str
    max_sequences: int  # completions in the engine at once
    max_staleness: int
    lease_s: float
    # Scoring never waits for anything, so finished groups may share one call.
    scores_together: bool
    # The rewards compare with rollouts of sight alone and of sound alone (docs/method.md 2.2).
    unimodal: bool
    confidence: bool = False  # rewards compare the log-probabilities of answers
    dead_by: DeadBy = "accuracy"  # of groups that are replaced (loop.dynamic_sampling)
    adapter: AdapterShape | None = None  # set: versions are adapters on ``model``
    turn_lock: Path | None = None  # set: the learner works on the same device, by turns
    records_experts: bool = False  # the learner takes the experts that the engine took
    stored: StoreSpec | None = None  # set: embeddings are taken in the place of towers' runs
    transport: str = "board"  # how versions come: weights.transport, resolved
