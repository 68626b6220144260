"""Stage 0, supervised fine-tuning on the learner's own rank group; the result is a model in the
cache that the RL run starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatar_rl.cluster.checkpoints.sft_checkpoint import SftCheckpoints
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets, cold_start_folder, made_once
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.workers.learner_group import death_among, last_line
from avatar_rl.cluster.workers.pool import Pool, StartDeathError, learner_spec, unwrap
from avatar_rl.cluster.workers.supervision import RestartBudget
from avatar_rl.common.errors import AvatarError
from avatar_rl.learner.state_replica import FileProof

if TYPE_CHECKING:
    import ray

CHUNK = 10  # updates between progress reports


def cold_start(
    config: RunConfig, pool: Pool, base: Path, datasets: Datasets, screen: Screen
) -> Path:
    """Folder of the cold-started policy; trains it unless the cache has it.

    One that was interrupted, or whose ranks died, resumes from its last checkpoint, with the same
    weights as an uninterrupted one. Raises ResourceError when its ranks die too often, and what
    they raise.
    """
    assert config.cold_start is not None and datasets.sft is not None
    folder = cold_start_folder(config, base, datasets.sft).resolve()
    with made_once(folder, lambda why: screen.phase("waiting for the cold start", why)) as missing:
        if missing:
            _ColdStartRun(config, pool, base, datasets, screen, folder).execute()
    return folder


class _ColdStartRun:
    def __init__(
        self,
        config: RunConfig,
        pool: Pool,
        base: Path,
        datasets: Datasets,
        screen: Screen,
        folder: Path,
    ) -> None:
        assert config.cold_start is not None
        self.sft, self.every = config.cold_start, config.cold_start.checkpoint_every
        self.pool, self.screen, self.folder = pool, screen, folder
        url = pool.services.redis_url  # for the heartbeats of ranks that start
        self.spec = learner_spec(config, "cold-start", base, datasets, url, cold_start=True)
        setting = {"ranks": self.sft.ranks, "zero_stage": self.sft.optimizer.zero_stage}
        self.saved = SftCheckpoints(folder, setting)
        self.budget = RestartBudget(config.supervision.restarts, "cold-start ranks")

    def execute(self) -> None:
        self.screen.phase(
            "cold start (SFT)", f"{self.sft.steps} steps of {self.sft.batch_size} prompts"
        )
        while True:
            try:
                self._train()
                return
            except _RankDied as death:
                self.screen.event(f"a cold-start rank died ({death}); all are replaced")
                self.budget.spend(str(death))
            finally:
                self.pool.stop_learner()

    def _train(self) -> None:
        """To the last update, or to the death of a rank (raises _RankDied)."""
        sft = self.sft
        try:
            self.pool.wait_ready(
                self.pool.start_learner(self.spec, ranks=sft.ranks),
                "cold-start learner",
                self.pool.starting_ranks,
            )
        except StartDeathError as error:
            raise _RankDied(last_line(error)) from error
        step = self._restored()
        while step < sft.steps:
            count = min(
                CHUNK, sft.steps - step, self.every - step % self.every if self.every else CHUNK
            )
            [report, *_] = self._wait([rank.sft.remote(step, count) for rank in self.pool.ranks])
            step += count
            self.screen.progress(step, sft.steps, detail=f"loss {report['loss']:.3f} per token")
            self.budget.progress()
            if self.every and step < sft.steps and step % self.every == 0:
                self._save(step)
        self._wait([rank.export.remote(self.folder) for rank in self.pool.ranks])
        self.saved.clear()

    def _restored(self) -> int:
        """Load the state of the newest checkpoint; how many updates it has."""
        found = self.saved.newest(self.screen.event)
        if found is None:
            return 0
        step, place = found
        self._wait([rank.restore_state.remote(place.resolve()) for rank in self.pool.ranks])
        self.screen.event(f"cold start resumes from step {step}")
        return step

    def _save(self, step: int) -> None:
        """A checkpoint that cannot be written is reported; the cold start continues."""
        try:
            self.saved.save(step, self._write)
        except OSError as error:
            self.screen.event(f"checkpoint of the cold start failed at step {step}: {error}")

    def _write(self, folder: Path) -> dict[str, FileProof]:
        self._wait([rank.capture_state.remote() for rank in self.pool.ranks])
        parts: list[dict[str, FileProof]] = self._wait(
            [rank.write_state.remote(folder) for rank in self.pool.ranks]
        )
        return {name: proof for part in parts for name, proof in part.items()}

    def _wait(self, references: Sequence[ray.ObjectRef[Any]]) -> list[Any]:
        """What every rank answers. Raises _RankDied, or what a rank raised while all lived."""
        import ray

        waiting = list(references)
        while waiting:
            [done], waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except ray.exceptions.RayActorError as error:
                raise _RankDied(last_line(error)) from error
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, AvatarError) or (death := death_among(waiting)) is None:
                    raise unwrap(error) from error
                raise _RankDied(death) from error
        return ray.get(references)


class _RankDied(Exception):
    """A rank's process died; the message says how."""
