"""Where the value of a key comes from: the default, a preset, the recipe, the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.fields import all_keys, sections
from avatar_rl.cluster.recipe.load import overridden, renamed
from avatar_rl.cluster.recipe.overlays import Overlay, beneath, merge, spelt_out
from avatar_rl.cluster.recipe.presets import stated
from avatar_rl.common.types import Json

DEFAULT = "default"
_ABSENT = object()


@dataclass(frozen=True)
class Layers:
    """What is laid over what, lowest first, by the name of where it comes from."""

    parts: tuple[tuple[str, Overlay], ...]

    @classmethod
    def of(
        cls,
        raw: Overlay,
        source: str,
        preset_name: str | None,
        overrides: Sequence[tuple[str, str]],
    ) -> Layers:
        """Those of a recipe's mapping. Raises ConfigError for unknown presets and old keys."""
        raw = renamed(raw, source)
        parts: list[tuple[str, Overlay]] = []
        if preset_name:
            parts.append((f"preset {preset_name}, from the command line", stated(preset_name)))
            raw = raw | {"preset": preset_name}
        elif raw.get("preset"):
            name = str(raw["preset"])
            parts.append((f"preset {name}, which {source} names", stated(name)))
        if raw:
            # without what the recipe takes out of it
            parts = [(origin, beneath(part, raw)) for origin, part in parts]
            parts.append((source, spelt_out(raw)))
        if overrides:
            over = overridden({}, overrides)
            parts = [
                (origin, beneath(part, over, replaces_weights=False)) for origin, part in parts
            ]
            parts.append(("the command line", spelt_out(over)))
        return cls(tuple(parts))

    def value(self, path: str) -> tuple[Any, str]:
        """The value at a key's dotted path as it was written, and where it comes from. A mapping is
        merged from all that say something of it; a key of a section that is left out has none."""
        for parent in _optional_parents(path):
            if not any(isinstance(_at(overlay, parent), dict) for _, overlay in self.parts):
                return None, f"section {parent} is left out"
        field = all_keys()[path].field
        value: Any = (
            None
            if field.is_required()
            else field.get_default(call_default_factory=True, validated_data={})
        )
        origins: list[str] = []
        for origin, overlay in self.parts:
            found = _at(overlay, path)
            if found is _ABSENT:
                continue
            if isinstance(found, dict) and isinstance(value, dict) and origins:
                value, origins = merge(value, found), [*origins, origin]
            else:
                value, origins = found, [origin]
        return value, " and ".join(origins) or DEFAULT


def _optional_parents(path: str) -> list[str]:
    """Sections around a key that are null unless they are given."""
    return [
        section
        for section, _, optional in sections(RunConfig)
        if optional and path.startswith(f"{section}.")
    ]


def _at(overlay: Json, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(overlay, dict) or name not in overlay:
            return _ABSENT
        overlay = overlay[name]
    return overlay
