"""`avatar presets [NAME]`: the named methods, and every key of one with its source."""

from __future__ import annotations

import json

from avatar_rl.cluster.recipe.presets import PRESETS, resolved


def show_presets(name: str | None) -> int:
    """Print all presets, or what ``name`` sets. Raises ConfigError for an unknown name."""
    if name is None:
        for known, preset in PRESETS.items():
            print(f"{known:<16} {preset.meaning}")
        return 0
    rows = [
        (key, json.dumps(setting.value, ensure_ascii=False), setting.source)
        for key, setting in resolved(name).items()
    ]
    print(f"# {name}: {PRESETS[name].meaning}")
    print("# key, value, source (sections of docs/method.md); your own keys lie over these")
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    widths[1] = min(widths[1], 60)
    for key, value, source in rows:
        print(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}")
    return 0
