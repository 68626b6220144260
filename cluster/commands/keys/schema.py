"""`avatar schema`: the JSON schema of a recipe, for editors and for programs.

``avatar schema > recipes/schema.json`` writes the copy that the recipes of the repository name in
their first line. A test keeps it equal.
"""

from __future__ import annotations

import json
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.curriculum.stages import StageConfig
from avatar_rl.cluster.recipe.load import find_recipe
from avatar_rl.cluster.recipe.presets import PRESETS
from avatar_rl.common.types import JsonObject

#: What a recipe may hold beside the keys of a run.
CURRICULUM = "Recipes of several stages (docs/curriculum.md)."
PACKAGED = Path("recipes") / "schema.json"


def schema() -> JsonObject:
    """Draft 2020-12, of a recipe with or without stages. Keys of presets may be left out of a
    recipe, so only what every recipe needs is required."""
    found: JsonObject = RunConfig.model_json_schema()
    definitions, properties = found["$defs"], found["properties"]
    assert isinstance(definitions, dict) and isinstance(properties, dict)
    stage = StageConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= stage.pop("$defs", {})
    definitions["StageConfig"] = stage
    properties["stages"] = {
        "type": "array",
        "minItems": 1,
        "items": {"$ref": "#/$defs/StageConfig"},
        "description": CURRICULUM,
    }
    properties["modality_check"] = {
        "type": "boolean",
        "default": False,
        "description": "Measure the last policy without sight and without sound, too.",
    }
    for owner in (properties, stage["properties"]):
        owner["preset"] = {
            "anyOf": [
                {"enum": list(PRESETS), "description": "A named method."},
                {"type": "null"},
            ],
            "default": None,
            "description": "Named overlay, below the recipe's own keys: "
            + "; ".join(f"{name}: {preset.meaning}" for name, preset in PRESETS.items()),
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "AVATAR-RL recipe",
        **{name: value for name, value in found.items() if name != "title"},
    }


def print_schema() -> int:
    print(json.dumps(schema(), indent=1, ensure_ascii=False))
    return 0


def modeline() -> str:
    """The first line of a recipe outside the repository: editors find the schema by it."""
    return f"# yaml-language-server: $schema={find_recipe(PACKAGED).resolve()}"
