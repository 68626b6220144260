"""Makes the finished cold start that a recipe of the tiny model brings along (`cold_start.ready`).

``python -m avatar_rl.cluster.training.make_ready recipes/local.yaml`` trains it as a run would,
measures it on the held-out prompts and writes it where the recipe looks for it. On one kind of
machine it comes out bit for bit the same; elsewhere floating-point sums may round otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.recipe.ready_start import MANIFEST, Made, settings_of
from avatar_rl.cluster.telemetry.live_view import open_screen
from avatar_rl.cluster.telemetry.phase_times import times_of
from avatar_rl.cluster.training.evaluate import evaluate
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.files import new_folder, sha256_of
from avatar_rl.common.types import Json, ReadOnlyObject

WEIGHTS = "model.safetensors"
#: Rows of the cold start whose text and scene stand for all.
ROWS = 64


def make_ready(config: RunConfig) -> Path:
    """Train (or take from the cache), measure, and put it in place of what is there.

    Raises ConfigError for a recipe without `cold_start.ready`, without the tiny model or without
    the synthetic world, and what a run raises.
    """
    sft = config.cold_start
    if sft is None or sft.ready is None or config.model.path != "tiny":
        raise ConfigError("the recipe has no cold_start.ready to be made, or another model")
    anew = config.model_copy(update={"cold_start": sft.model_copy(update={"ready": None})})
    with open_screen(config.screen, 1, title="cold start", times=times_of(config)) as screen:
        result = evaluate(anew, screen)
    [evaluation] = result.evaluations
    old = sft.ready.with_name(f".{sft.ready.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if sft.ready.exists():
        sft.ready.rename(old)
    with new_folder(sft.ready) as work:
        for file in result.model.iterdir():
            shutil.copyfile(file, work / file.name)
        made = Made(
            settings=settings_of(anew),
            accuracy=round(evaluation.accuracy, 4),
            prompts=evaluation.prompts,
            files={file.name: sha256_of(file) for file in sorted(work.iterdir())},
            fingerprint=dict(fingerprint(anew, result.model)),
        )
        (work / MANIFEST).write_text(made.model_dump_json(indent=1) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    return sft.ready


def fingerprint(config: RunConfig, model: Path) -> ReadOnlyObject:
    """What the code makes of the settings, where that decides what the cold start learns.

    Files of the model but its weights, shapes of the tensors, and the cold start's first rows:
    their scenes, their prompts and targets as text, and both as tokens. A few numbers of the
    pictures and sounds stand for them, rounded so that processors may differ in the last digit.

    Args:
        config: A recipe with the synthetic world.
        model: A folder of the tiny model, trained or not.
    """
    from safetensors import safe_open

    with safe_open(model / WEIGHTS, framework="np") as tensors:
        shapes = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    files = {
        file.name: _content(file)
        for file in sorted(model.iterdir())
        if file.name not in (WEIGHTS, MANIFEST)
    }
    return {"files": files, "tensors": dict(sorted(shapes.items())), **_rows(config, model)}


def _content(file: Path) -> str:
    """Digest of what a file says: JSON by its values, without the library that wrote it and the
    type of the weights, which an export states more often."""
    if file.suffix != ".json":
        return sha256_of(file)
    content = _without(json.loads(file.read_bytes()), ("transformers_version", "dtype"))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without(content: Json, names: tuple[str, ...]) -> Json:
    if isinstance(content, list):
        return [_without(item, names) for item in content]
    if not isinstance(content, dict):
        return content
    return {name: _without(item, names) for name, item in content.items() if name not in names}


def _rows(config: RunConfig, model: Path) -> ReadOnlyObject:
    """Digests of the first rows of sft.jsonl, and numbers of their media."""
    import numpy as np

    from avatar_rl.learner.sft import target_text
    from avatar_rl.prompts.config import MediaConfig
    from avatar_rl.prompts.encoding.template import PromptEncoder
    from avatar_rl.prompts.media.loader import MediaLoader
    from avatar_rl.prompts.synthetic.world import first_taught

    world = config.data.synthetic
    assert world is not None
    encoder = PromptEncoder(model, MediaLoader(MediaConfig(), Path(".")), config.data.template)
    texts, tokens, pictures, sounds = [], [], [], []
    for row in first_taught(world, ROWS):
        hinted = row.prompt.extra.get("hinted") == "true"
        both = [encoder.text(row.prompt, hinted), target_text(row.prompt)]
        texts.append([row.prompt.extra["scene"], *both])
        tokens.append([encoder.tokenizer(text)["input_ids"] for text in both])
        pictures.append(round(float(np.mean(row.frames)), 1))
        sounds.append(round(float(np.abs(row.sound, dtype=np.float64).mean()), 0))
    return {
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        "pictures": pictures,
        "sounds": sounds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    options = parser.parse_args(arguments)
    print(make_ready(load_recipe(options.recipe)))


if __name__ == "__main__":
    main()
