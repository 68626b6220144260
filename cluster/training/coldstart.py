"""Stage 0 on the learner's own rank group; the result is a checkpoint in the cache that the RL run
starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avatar_rl.cluster.checkpoints.sft_checkpoint import SftCheckpoints
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets, cold_start_folder
from avatar_rl.cluster.recipe.cache import made_once
from avatar_rl.cluster.services.restart_budget import RestartBudget
from avatar_rl.cluster.workers.learner_group import death_among, last_line
from avatar_rl.cluster.workers.pool import Pool, StartDeathError, unwrap
from avatar_rl.cluster.workers.specs import learner_spec
from avatar_rl.common.errors import AvatarError
from avatar_rl.learner.state_replica import FileProof

CHUNK = 10  # updates between progress reports


def cold_start(config: RunConfig, pool: Pool, base: Path, datasets: Datasets, screen: Any) -> Path:
    """Folder of the cold-started policy; trains it unless the cache has it.

    One that was interrupted, or whose ranks died, goes on from its last checkpoint: the same
    weights as without. Raises ResourceError when its ranks die too often, and what they raise."""
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
        screen: Any,
        folder: Path,
    ) -> None:
        assert config.cold_start is not None
        self.sft, self.every, self.pool, self.screen, self.folder = (
            config.cold_start,
            config.cold_start.checkpoint_every,
            pool,
            screen,
            folder,
        )
        self.spec = learner_spec(config, "cold-start", base, datasets, "", cold_start=True)
        setting = {"ranks": self.sft.ranks, "zero_stage": self.sft.optimizer.zero_stage}
        self.saved = SftCheckpoints(folder, setting)
        self.budget = RestartBudget(config.supervision.restarts, "cold-start ranks")

    def execute(self) -> None:
        self.screen.phase(
            "cold start (SFT)", f"{self.sft.steps} steps of {self.sft.batch_size} prompts"
        )
        while True:
            try:
                self._life()
                return
            except _RankDied as death:
                self.screen.event(f"a cold-start rank died ({death}); all are replaced")
                self.budget.spend(str(death))
            finally:
                self.pool.stop_learner()

    def _life(self) -> None:
        """Of one rank group, to the end of the training or its own."""
        sft = self.sft
        try:
            self.pool.wait_ready(
                self.pool.start_learner(self.spec, ranks=sft.ranks), "cold-start learner"
            )
        except StartDeathError as error:
            raise _RankDied(last_line(error)) from error
        step = self._restored()
        while step < sft.steps:
            count = min(
                CHUNK, sft.steps - step, self.every - step % self.every if self.every else CHUNK
            )
            [report, *_] = self._all("sft", step, count)
            step += count
            self.screen.progress(step, sft.steps, detail=f"loss {report['loss']:.3f} per token")
            self.budget.progress()
            if self.every and step < sft.steps and step % self.every == 0:
                self._save(step)
        self._all("export", self.folder)
        self.saved.clear()

    def _restored(self) -> int:
        """Updates that are done already; their state is loaded."""
        found = self.saved.newest(self.screen.event)
        if found is None:
            return 0
        step, place = found
        self._all("restore_state", place.resolve())
        self.screen.event(f"cold start goes on from step {step}")
        return step

    def _save(self, step: int) -> None:
        """A checkpoint that cannot be written is reported; the cold start goes on."""
        try:
            self.saved.save(step, self._write)
        except OSError as error:
            self.screen.event(f"checkpoint of the cold start failed at step {step}: {error}")

    def _write(self, scratch: Path) -> dict[str, FileProof]:
        self._all("capture_state")
        return {
            name: proof
            for part in self._all("write_state", scratch)
            for name, proof in part.items()
        }

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What every rank answers. Raises _RankDied, or what a rank raised while all lived."""
        import ray

        references = [getattr(rank, method).remote(*arguments) for rank in self.pool.ranks]
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
    """How."""
