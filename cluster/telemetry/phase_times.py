"""How long the phases of a recipe took here before, for those that cannot count how far they
are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.errors import AvatarError
from avatar_rl.common.files import replace_text

log = logging.getLogger(__name__)

FILE = "phase-times.json"
#: A first run of the tiny model on two cores.
TINY_S = {
    "starting Redis and Ray": 5.0,
    "starting actors": 25.0,
    "parity probe": 2.0,
    "exporting": 1.0,
    "writing the report": 4.0,
}


class PhaseTimes:
    """Seconds by phase, kept in one file for all recipes of a cache folder.

    A file that cannot be read or written costs the estimates, never the run.

    Args:
        path: The file; None keeps nothing.
        recipe: Name of the recipe.
        first: What to expect where nothing is known yet.
    """

    def __init__(
        self, path: Path | None = None, recipe: str = "", first: Mapping[str, float] | None = None
    ) -> None:
        self.path, self.recipe = path, recipe
        self._known: dict[str, float] = {**(first or {}), **self._read().get(recipe, {})}

    def expected(self, phase: str) -> float | None:
        return self._known.get(phase)

    def learn(self, phase: str, seconds: float) -> None:
        """A phase has ended."""
        self._known[phase] = round(seconds, 1)
        if self.path is None:
            return
        kept = self._read()
        kept.setdefault(self.recipe, {})[phase] = round(seconds, 1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(kept, indent=1) + "\n")
        except (OSError, AvatarError) as error:
            log.info("phase times are not kept: %s", error)

    def _read(self) -> dict[str, dict[str, float]]:
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {
            str(recipe): {
                str(phase): float(seconds)
                for phase, seconds in phases.items()
                if isinstance(seconds, int | float)
            }
            for recipe, phases in found.items()
            if isinstance(phases, dict)
        }


def times_of(config: RunConfig) -> PhaseTimes:
    """Those of a recipe, in its cache folder."""
    first = TINY_S if config.model.path == "tiny" else None
    return PhaseTimes(config.output.cache / FILE, config.name, first)
