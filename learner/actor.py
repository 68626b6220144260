"""The learner rank as Ray knows it: a process that only holds a handle (the driver, the weight
store) need not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rl.common.process import name_log, no_collections
from avatar_rl.learner.spec import LearnerSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from avatar_rl.learner.rank import ProbeCompletion, ProbeScores, Progress, SetupReport
    from avatar_rl.learner.sft import SftReport
    from avatar_rl.learner.state_replica import FileProof
    from avatar_rl.learner.step import StepReport


class LearnerRankActor:
    """Plain class; the cluster makes it a Ray actor. Ray imports the class of every handle it is
    given, so this one is light and makes the real rank in its own process.

    All but ``progress``, ``meeting_point``, ``write_state``, ``begin_turn``, ``end_turn`` and
    ``publish_again`` without a version are collective: ask all ranks at the same time. Colocated
    ranks refuse those outside their turn."""

    @no_collections()
    def __init__(
        self,
        spec: LearnerSpec,
        rank: int,
        ranks: int,
        weight_store: ActorHandle,
        state_replica: ActorHandle | None = None,
    ) -> None:
        from avatar_rl.buffer_service.control import RunControl, StartBeats

        name_log(f"{'cold-start' if spec.sft is not None else 'learner'}-{rank}")
        self._starting: StartBeats | None = None
        if spec.redis_url:  # a cold start comes before Redis
            control = RunControl.at(spec.buffer, spec.run_id, spec.redis_url)
            self._starting = StartBeats(control, "learner", str(rank))
        from avatar_rl.learner.rank import LearnerRank  # torch

        self.learner = LearnerRank(spec, rank, ranks, weight_store, state_replica)
        self.outbox = self.learner.outbox  # for the weight store's standing call

    def progress(self) -> Progress:
        """How far it has come, answered while a step is trained."""
        return self.learner.progress()

    def meeting_point(self) -> tuple[str, int]:
        """Rank 0: address and port where the group meets."""
        return self.learner.meeting_point()

    def setup(self, address: str, port: int) -> SetupReport:
        """Join the group and load the policy."""
        report = self.learner.setup(address, port)
        if self._starting is not None:
            self._starting.end()
        return report

    def sft(self, first: int, count: int) -> SftReport:
        """``count`` cold-start updates from ``first``."""
        return self.learner.sft(first, count)

    def probe(self, completions: Sequence[ProbeCompletion]) -> list[ProbeScores]:
        """The learner's view of the engine's probe completions."""
        self.learner.turn.check()
        return self.learner.probe(completions)

    def train_step(self, step: int, *, samples: int = 0) -> StepReport | None:
        """Train ``step``, publish and commit; rank 0 reports."""
        self.learner.turn.check()
        return self.learner.train_step(step, samples=samples)

    def begin_turn(self) -> None:
        """Colocated: the device is the rank's. Returns once it may work."""
        self.learner.turn.begin()

    def end_turn(self) -> None:
        """Colocated: leave the device to the rollout engine."""
        self.learner.turn.end()

    def export(self, path: Path) -> str:
        """Write the policy as a Hugging Face checkpoint."""
        self.learner.turn.check()
        return self.learner.export(path)

    def replicate(self, version: int) -> None:
        """Leave a copy of the state, which is that of ``version``, with the state replica."""
        self.learner.turn.check()
        self.learner.replicator.replicate(version)

    def capture_state(self) -> None:
        """Copy the state into this process's memory, for ``write_state``."""
        self.learner.turn.check()
        self.learner.replicator.capture()

    def write_state(self, folder: Path) -> dict[str, FileProof]:
        """Write the captured state below ``folder``, beside a training step."""
        return self.learner.replicator.write(folder)

    def restore_state(self, folder: Path) -> None:
        """Resume from a state that was written below ``folder``."""
        self.learner.turn.check()
        self.learner.replicator.restore(folder)

    def publish_again(self, version: int | None = None) -> int:
        """Offer the newest version to a weight store that lost it; with ``version``, publish these
        weights under that number."""
        if version is not None:
            self.learner.turn.check()
        return self.learner.publish_again(version)
