"""What training and evaluation both stand on: started in order, stopped in reverse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets
from avatar_rl.cluster.recipe.ready_start import ready_start, why_not_ready
from avatar_rl.cluster.recipe.resources import Needs
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.cluster.telemetry.run_logs import farewell
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.coldstart import cold_start
from avatar_rl.cluster.workers.pool import Pool, rollout_spec
from avatar_rl.cluster.workers.rollout_fleet import RolloutFleet


@dataclass(frozen=True)
class System:
    """Redis, Ray and the pool of actors are up; ``folder`` and ``screen`` hear what happens."""

    config: RunConfig
    folder: RunFolder
    screen: Screen
    datasets: Datasets
    services: Services
    pool: Pool

    def report(self, kind: str, message: str) -> None:
        """Into the run's events and on the screen."""
        self.folder.event(kind, message)
        self.screen.event(f"{kind}: {message}")

    def starting_policy(self, base: Path) -> Path:
        """Folder of the model to begin with: the recipe's cold start, trained unless the cache has
        it, or ``base`` where that is it or the recipe has none. Raises what ``cold_start``
        does."""
        if self.config.cold_start is None or ready_start(self.config) is not None:
            return base
        if why := why_not_ready(self.config):
            self.report("cold start", why)
        return cold_start(self.config, self.pool, base, self.datasets, self.screen)

    def rollout_fleet(
        self, config: RunConfig, run_id: str, model: Path, buffer: ReplayBuffer
    ) -> RolloutFleet:
        """Rollout actors of ``model``, not started yet. ``config`` may show them other media."""
        spec = rollout_spec(
            config,
            run_id,
            model,
            self.datasets,
            self.services.redis_url,
            on_gpu=self.services.on_gpu,
            turn_lock=self.turn_lock,
        )
        scaling = config.rollout
        if self.turn_lock is not None:  # as many as there are devices for
            size = {"min_workers": scaling.workers, "max_workers": scaling.workers}
            scaling = scaling.model_copy(update=size)
        return RolloutFleet(self.pool, spec, buffer, self.folder, self.screen, scaling=scaling)

    @property
    def turn_lock(self) -> Path | None:
        """The file by which engines and ranks take turns; None where each has its own device."""
        return self.folder.path / "device.turns" if self.config.resources.colocate else None


@contextmanager
def running_system(
    config: RunConfig,
    folder: RunFolder,
    screen: Screen,
    datasets: Datasets,
    *,
    needs: Needs | None = None,
) -> Iterator[System]:
    """Services and actors of ``config``; the workers' logs are written to the run folder.

    ``needs`` replaces what the recipe's training needs. Raises ConfigError and ResourceError as
    ``Services`` does.
    """
    with ExitStack() as stack:
        screen.phase("starting Redis and Ray")
        services = stack.enter_context(Services(config, folder.path, needs))
        yield System(config, folder, screen, datasets, services, Pool(config, services))


@contextmanager
def recorded(folder: RunFolder) -> Iterator[None]:
    """Says in the run folder how the block failed, if it does."""
    try:
        yield
    except BaseException as error:
        state: Literal["interrupted", "failed"] = (
            "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        )
        folder.event(state, str(error) or type(error).__name__)
        folder.status(state=state, error=str(error))
        error.add_note(farewell(folder.path, error))
        raise
