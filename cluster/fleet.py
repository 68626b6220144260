"""The rollout actors of a run: started, watched, replaced, stopped."""

from __future__ import annotations

from typing import Any

from actors.spec import RolloutSpec
from buffer_service.store import ReplayBuffer
from cluster.pool import Pool, unwrap
from cluster.screen import Screen
from cluster.supervision import Budget
from cluster.telemetry import RunFolder

STOP_S = 5.0


class Fleet:
    """Supervises the rollout actors. An actor that dies is replaced, and its leases are given back."""

    def __init__(self, pool: Pool, spec: RolloutSpec, buffer: ReplayBuffer, folder: RunFolder, screen: Screen) -> None:
        self.pool, self.spec, self.buffer, self.folder, self.screen = pool, spec, buffer, folder, screen
        self.working: dict[Any, str] = {}  # run() reference -> actor
        self.budget = Budget(pool.config.supervision.restarts, "rollout actors")
        self._named = 0

    def start(self, count: int) -> list[Any]:
        """``count`` new actors; returns the references of their readiness. ``work`` sets them going."""
        names = [f"rollout-{self._named + number}" for number in range(count)]
        self._named += count
        return self.pool.start_rollouts(self.spec, names)

    def work(self) -> None:
        """Set every actor going that is not."""
        idle = set(self.pool.rollouts) - set(self.working.values())
        self.working |= {self.pool.rollouts[name].run.remote(): name for name in sorted(idle)}

    def watch(self, timeout: float = 0.1) -> None:
        """Replace the actors that died, waiting for a death up to ``timeout`` seconds."""
        import ray

        done, _ = ray.wait(list(self.working), num_returns=1, timeout=timeout)
        for reference in done:
            self.replace(reference)

    def replace(self, reference: Any) -> None:
        """An actor's ``run`` ended on its own: say why and start another."""
        import ray

        name = self.working.pop(reference)
        try:
            ray.get(reference)
            reason = "stopped"
        except ray.exceptions.RayError as error:
            reason = str(unwrap(error))
        self.folder.event("rollout actor died", f"{name}: {reason}")
        self.screen.event(f"{name} died and is replaced: {reason.splitlines()[-1][:160]}")
        self.budget.spend(f"{name}: {reason}")
        self.pool.rollouts.pop(name)
        self.buffer.abandon(name)
        self.buffer.drop_beat("rollout", name)
        self.start(1)
        self.work()

    def stop(self) -> None:
        """Ask the actors to stop and give them a moment, so that they leave no lease behind."""
        import ray

        if not ray.is_initialized():
            return
        for actor in self.pool.rollouts.values():
            actor.stop.remote()
        if self.working:
            ray.wait(list(self.working), num_returns=len(self.working), timeout=STOP_S)
