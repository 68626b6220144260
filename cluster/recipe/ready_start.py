"""A finished cold start that comes with a recipe (`cold_start.ready`), and whether it is what the
recipe's own settings would make.

`make cold-start` (training/make_ready.py) makes such a folder: a model in Hugging
Face's layout with `made.json`, which says what it was made with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.content import REVISION
from avatar_rl.cluster.recipe.load import find_recipe
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.files import sha256_of
from avatar_rl.common.types import Json, JsonObject
from avatar_rl.learner.config import SftConfig
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.synthetic.config import WorldConfig

MANIFEST = "made.json"
MAKE = "make cold-start"
#: Keys of the world that say nothing about the prompts that RL asks, and nothing about those that
#: the cold start is taught with.
TAUGHT_ONLY = {"n_sft", "sft_weights", "guess_share", "hinted_share"}
ASKED_ONLY = {"n_train", "n_heldout", "weights"}


class Made(BaseModel):
    """`made.json`: what a finished cold start was made with, and what it can do."""

    settings: dict[str, Any]  # ``settings_of`` its recipe
    accuracy: float  # held-out
    prompts: int
    files: dict[str, str]  # name -> sha256
    fingerprint: dict[str, Any]  # of what the code made of the settings (training/make_ready.py)


def ready_start(config: RunConfig) -> Path | None:
    """The finished cold start that a run of ``config`` begins from; None where it trains one, or
    has none.

    Raises ConfigError for a folder that is missing, torn or changed.
    """
    if config.cold_start is None or config.cold_start.ready is None:
        return None
    folder = find_recipe(config.cold_start.ready)
    made = read_made(folder)
    if differences(made.settings, settings_of(config)):
        return None
    for name, digest in made.files.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise ConfigError(
                f"cold_start.ready {folder}: {name} is not the file that {MANIFEST} lists; restore "
                f"the folder, make it anew (`{MAKE}`), or set cold_start.ready: null to "
                "train the cold start"
            )
    return folder.resolve()


def why_not_ready(config: RunConfig) -> str:
    """Why the recipe's finished cold start is not taken, in a sentence; empty where it is, or where
    the recipe names none."""
    if config.cold_start is None or config.cold_start.ready is None:
        return ""
    made = read_made(find_recipe(config.cold_start.ready))
    found = differences(made.settings, settings_of(config))
    if not found:
        return ""
    shown = ", ".join(f"{name} {before!r}, here {now!r}" for name, before, now in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"the cold start is trained: {config.cold_start.ready} was made with {shown}{more}"


def read_made(folder: Path) -> Made:
    """Raises ConfigError where ``folder`` is no finished cold start."""
    try:
        return Made.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        what = "is missing" if isinstance(error, OSError) else "is torn"
        raise ConfigError(
            f"cold_start.ready {folder}: its {MANIFEST} {what}; make the folder (`{MAKE}`), "
            "or set cold_start.ready: null to train the cold start"
        ) from error


def settings_of(config: RunConfig) -> JsonObject:
    """What of a recipe a cold start of the tiny model depends on. The seed is left out: a run of
    another seed may begin from the same weights."""
    sft, world = config.cold_start, config.data.synthetic
    return {
        "revision": REVISION,
        "model": {"path": config.model.path},
        "cold_start": None if sft is None else sft_settings(sft),
        "data": {
            "template": template_settings(config.data.template),
            "synthetic": None if world is None else taught_settings(world),
        },
    }


def sft_settings(sft: SftConfig) -> JsonObject:
    """What of the cold start's section its result depends on."""
    left_out = {"ranks", "checkpoint_every", "ready"}
    if sft.lora is None:  # so those of before there was LoRA are found
        left_out.add("lora")
    found: JsonObject = sft.model_dump(mode="json", exclude=left_out)
    optimizer = found["optimizer"]
    if isinstance(optimizer, dict) and not sft.optimizer.accumulate_in_float32:
        del optimizer["accumulate_in_float32"]  # likewise
    return found


def template_settings(template: TemplateConfig) -> JsonObject:
    left_out = {"cache_bytes"}
    if template.total_video_tokens is None:  # so those of before there was such a bound are found
        left_out.add("total_video_tokens")
    return template.model_dump(mode="json", exclude=left_out)


def taught_settings(world: WorldConfig) -> JsonObject:
    """What of a world its sft.jsonl depends on."""
    return world.model_dump(mode="json", exclude=ASKED_ONLY)


def differences(before: Json, now: Json, name: str = "") -> list[tuple[str, Json, Json]]:
    """(dotted name, before, now) of every value that is not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted(before.keys() | now.keys())
            for found in differences(
                before.get(key), now.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if before == now else [(name, before, now)]
