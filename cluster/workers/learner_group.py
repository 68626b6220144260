"""The learner's rank group: a rank that dies costs its step, never the run.

The whole table of what a death costs is in supervision.py; docs/survival.md explains it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.workers.pool import Pool, StartDeathError, unwrap
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet
from avatar_rl.cluster.workers.supervision import LearnerWatch, Report, RestartBudget
from avatar_rl.common.errors import AvatarError, ResourceError
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state_replica import FileProof

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from avatar_rl.learner.rank import SetupReport
    from avatar_rl.learner.step import StepReport

LOOK_S = 0.5  # between looks at everything else while a step is trained
LAST_WORDS_S = 10.0  # a rank whose peer died fails too, perhaps before the death itself is known


T = TypeVar("T")
Proofs = dict[str, FileProof]  # path below the learner's folder -> what the file must read back as


class StateLostError(ResourceError):
    """The learner died and nobody holds its state: the run goes back to its last checkpoint."""


class LearnerGroup:
    """Trains steps on all ranks. When a rank dies it replaces the group, which continues from the
    state that the replica holds."""

    def __init__(
        self,
        pool: Pool,
        spec: LearnerSpec,
        ranks: int,
        replica: ActorHandle,
        buffer: ReplayBuffer,
        scratch: Path,
        budget: RestartBudget,
        report: Report,
        stall_s: float = 600.0,
    ) -> None:
        self.pool, self.spec, self.ranks, self.buffer = pool, spec, ranks, buffer
        self.replica = replica
        self.scratch = scratch  # of a state on its way to new ranks; all of them see this disk
        self._budget, self._report, self._stall_s = budget, report, stall_s

    def start(self) -> list[ray.ObjectRef[SetupReport]]:
        """Start all ranks; the references are for ``await_ready``."""
        while True:
            try:
                return self.pool.start_learner(self.spec, ranks=self.ranks)
            except StartDeathError as death:
                self._start_over(death)

    def await_ready(self, references: Sequence[ray.ObjectRef[SetupReport]]) -> list[SetupReport]:
        """What each rank says when ready. One that dies meanwhile costs the group a new start."""
        while True:
            try:
                return self.pool.wait_ready(references, "learner ranks", self.pool.starting_ranks)
            except StartDeathError as death:
                self._start_over(death)
                references = self.start()

    def _start_over(self, death: StartDeathError) -> None:
        reason = last_line(death)
        self._report("learner died", f"while starting: {reason}; it is replaced")
        self._budget.spend(reason)
        self.pool.stop_learner()

    def train(
        self, step: int, samples: int, fleet: RolloutFleet, look: Callable[[], None]
    ) -> StepReport:
        """One step on all ranks; meanwhile dead rollout actors are replaced and ``look`` is called.

        Returns rank 0's report, empty when the step was committed and the rank died before it said
        so.

        Args:
            step: Number of the step, from 0.
            samples: Completions to report with their text.
            fleet: Watched while the ranks train.
            look: Called at least twice a second.

        Raises:
            ResourceError: ranks died too often.
            StateLostError: a rank died and nobody holds the state.
            AvatarError: what a rank raised itself, and what ``look`` raises.
        """
        while True:
            waiting: list[ray.ObjectRef[StepReport]] = [
                rank.train_step.remote(step, samples=samples) for rank in self.pool.ranks
            ]
            death = self._wait(waiting, fleet, look)
            if death is None:
                import ray

                self._budget.progress()
                return ray.get(waiting[0])
            self._budget.spend(death)
            self.recover(step, death)
            if self.buffer.stats.read().trained_step >= step:
                self._report(
                    "report lost", f"step {step} was committed; its metrics died with the learner"
                )
                return {"metrics": {}, "samples": [], "distributions": {}, "device": ""}

    def _wait(
        self,
        references: list[ray.ObjectRef[StepReport]],
        fleet: RolloutFleet,
        look: Callable[[], None],
    ) -> str | None:
        """None when all ranks are done, else how one died."""
        import ray

        waiting, watch = list(references), LearnerWatch(self.pool.ranks, self._stall_s)
        while waiting:
            if (reason := watch.look()) is not None:
                self._report("learner stalled", f"{reason}; it is killed")
                watch.kill()  # and found dead below
            done, _ = ray.wait([*waiting, *fleet.working], num_returns=1, timeout=LOOK_S)
            for reference in done:
                if reference in fleet.working:
                    fleet.replace(reference)
                    continue
                waiting.remove(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    return last_line(error)
                except ray.exceptions.RayTaskError as error:
                    if (
                        isinstance(error.cause, AvatarError)
                        or (death := death_among(waiting)) is None
                    ):
                        raise unwrap(error) from error
                    return death
            look()
            fleet.reconcile()
        return None

    def begin_turn(self, look: Callable[[], None]) -> None:
        """Colocated: the ranks take their devices. One that is dead is found by its next step."""
        self._tell("begin_turn", look)

    def end_turn(self, look: Callable[[], None]) -> None:
        """Colocated: the ranks leave their devices to the rollout engines."""
        self._tell("end_turn", look)

    def _tell(self, what: str, look: Callable[[], None]) -> None:
        """Returns once all ranks that live have answered; ``look`` is called meanwhile."""
        import ray

        waiting = [getattr(rank, what).remote() for rank in self.pool.ranks]
        watch = LearnerWatch(self.pool.ranks, self._stall_s)
        while waiting:
            if (reason := watch.look()) is not None:
                self._report("learner stalled", f"{reason}; it is killed")
                watch.kill()
            done, waiting = ray.wait(waiting, num_returns=1, timeout=LOOK_S)
            for reference in done:
                try:
                    ray.get(reference)
                except ray.exceptions.RayActorError:
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise unwrap(error) from error
            look()

    def recover(self, step: int, death: str) -> None:
        """A new group in place of the dead one, with the state of the newest committed version.

        The old group is ended and fenced first, so that the version cannot change any more: a
        commit under way has then either happened or will be refused.
        """
        import ray

        self._report("learner died", f"in step {step}: {death}; it is replaced")
        self.pool.stop_learner()
        self.buffer.replay.new_fencing_token()
        version = self.buffer.replay.version()
        folder = self.scratch
        shutil.rmtree(folder, ignore_errors=True)
        if version and ray.get(self.replica.write.remote(version, folder)) is None:
            raise StateLostError(
                f"the learner died in step {step} and its state of version {version} is held by "
                "nobody: it is larger than checkpoint.replica_bytes, or its replica died too"
            )
        self.await_ready(self.start())
        if version:
            self.restore(folder, version)
        shutil.rmtree(folder, ignore_errors=True)
        self._report("learner restarted", f"it continues from version {version}")

    def restore(self, folder: Path, version: int) -> None:
        """Load the state below ``folder`` on all ranks and put its weights on the weight store."""
        import ray

        try:
            ray.get([rank.restore_state.remote(folder.resolve()) for rank in self.pool.ranks])
            if version:
                ray.get([rank.publish_again.remote(version) for rank in self.pool.ranks])
            # Held again: should the next step never be finished, somebody still has this version.
            ray.get([rank.replicate.remote(version) for rank in self.pool.ranks])
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from error
        except ray.exceptions.RayActorError as error:
            raise StateLostError(
                f"the learner died while it loaded its state: {last_line(error)}"
            ) from error

    def held(self, version: int) -> bool:
        """Whether the replica holds the state of ``version``."""
        import ray

        return version in ray.get(self.replica.versions.remote())

    def writer(self, version: int) -> Callable[[Path], Proofs]:
        """A function that writes the state of ``version`` below a folder while training continues.

        Call it between two steps: a state that no replica holds is copied now, by the ranks
        themselves. Raises ResourceError when a rank is dead.
        """
        import ray

        pinned: ray.ObjectRef[bool] = self.replica.pin.remote(version)
        held = ray.get(pinned)
        if not held:
            try:
                ray.get([rank.capture_state.remote() for rank in self.pool.ranks])
            except ray.exceptions.RayActorError as error:
                raise ResourceError(f"a learner rank died: {last_line(error)}") from error

        def write(folder: Path) -> Proofs:
            if held:
                proofs = ray.get(self.replica.write.remote(version, folder.resolve()))
                if proofs is None:
                    raise ResourceError(
                        f"the state of version {version} is not held any more: its replica died"
                    )
                return proofs
            parts = ray.get([rank.write_state.remote(folder.resolve()) for rank in self.pool.ranks])
            return {name: proof for part in parts for name, proof in part.items()}

        return write

    def export(self, path: Path) -> None:
        """The policy as a Hugging Face checkpoint; a learner that died since its last step is
        brought back for it."""
        import ray

        while True:
            try:
                ray.get([rank.export.remote(path.resolve()) for rank in self.pool.ranks])
                return
            except ray.exceptions.RayTaskError as error:
                raise unwrap(error) from error
            except ray.exceptions.RayActorError as error:
                self._budget.spend(last_line(error))
                self.recover(self.spec.steps, last_line(error))


def death_among(references: Sequence[ray.ObjectRef[T]]) -> str | None:
    """How one of the ranks still waited for died, if one did; what another raised was then the
    consequence."""
    import ray

    rest = list(references)
    while rest:
        done, rest = ray.wait(rest, num_returns=1, timeout=LAST_WORDS_S)
        if not done:
            return None
        try:
            ray.get(done[0])
        except ray.exceptions.RayActorError as error:
            return last_line(error)
        except ray.exceptions.RayTaskError:
            continue
    return None


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
