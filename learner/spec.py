"""What a learner rank is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.learner.config import LearnerConfig, SftConfig
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig


@dataclass(frozen=True)
class LearnerSpec:
    """All a learner rank needs to know; plain data, sent once."""

    run_id: str
    seed: int
    model: Path
    reference: Path
    datasets: tuple[Path, ...]
    data: DataConfig
    media: MediaConfig
    template: TemplateConfig
    learner: LearnerConfig
    sft: SftConfig | None  # set: this group runs the cold start and never meets the buffer
    buffer: BufferConfig
    redis_url: str
    steps: int
    replayed: int  # per group
    max_tokens: int  # longest completion that is sampled
    step_timeout_s: float
    attempts: int = 1  # seqs of a group, of which the last that came is trained
    engine_dtype: str = "float32"  # of the rollouts, whose log-probabilities are stored
    publishes_adapter: bool = False  # rollouts take the adapter itself, not merged weights
    transport: str = "board"  # how versions travel: weights.transport, resolved
    board_every: int = 1  # which of them are on the board, too
    replica_bytes: int = 0  # state up to this size is replicated at every step
    turn_lock: Path | None = None  # set: rollout engines work on the same device, by turns
    leaves_device: bool = False  # with its turn the rank leaves the GPU's memory, too

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter that this group trains; None: it trains the model."""
        return self.sft.lora if self.sft is not None else self.learner.lora

    @property
    def only_advantages(self) -> bool:
        """Whether completions with an advantage of 0 are left out of the update.

        They add nothing to the gradient where no other term of the loss looks at them: no KL to a
        reference, no balance of routers. The hint gate wants the KL of their prompts, and with
        ``joint`` a later update of the step may give them an advantage.
        """
        objective = self.learner.objective
        return (
            self.learner.skip_dead
            and objective.beta == 0
            and self.learner.router != "balanced"
            and not self.buffer.hints.enabled
            and (objective.replay_advantage != "joint" or self.learner.updates == 1)
        )
