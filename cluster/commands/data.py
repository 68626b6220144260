"""`avatar data validate` and `avatar data synthesize`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import checkpoint_folder
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.prompts.config import DataConfig, MediaConfig


def validate_dataset(dataset: Path, *, recipe: Path | None, decode: bool) -> int:
    """Table of problems on the terminal; exit code 1 when there is one."""
    from avatar_rl.prompts.validate import render, validate

    config = load_recipe(recipe) if recipe is not None else None
    console = Console()
    with console.status(f"reading {dataset}") as status:
        report = validate(
            dataset,
            config.data.reader if config else DataConfig(),
            decode=decode,
            processor_path=_processor(config),
            template=config.data.template if config else None,
            media=config.data.media if config else MediaConfig(),
            progress=lambda rows: status.update(f"reading {dataset}: {rows} rows"),
        )
    render(report, console)
    return 0 if report.ok else 1


def synthesize_world(folder: Path, *, recipe: Path | None, seed: int | None) -> int:
    from avatar_rl.prompts.synthetic.config import WorldConfig
    from avatar_rl.prompts.synthetic.world import synthesize

    config = load_recipe(recipe).data.synthetic if recipe is not None else None
    world = config or WorldConfig()
    if seed is not None:
        world = world.model_copy(update={"seed": seed})
    report = synthesize(folder, world)
    for split, counts in report.counts.items():
        print(f"{report.out / split}.jsonl  {sum(counts.values())} prompts")
    print(f"media {report.media_bytes / 1e6:.1f} MB")
    return 0


def _processor(config: RunConfig | None) -> Path | None:
    """Model folder whose processor counts tokens; the tiny model is not built just for that."""
    return None if config is None else checkpoint_folder(config)
