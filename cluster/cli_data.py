"""`avatar data ...`: look at a dataset, make the synthetic one, and choose samples by scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

import click

from avatar_rl.cluster.cli_endpoint import asks_endpoint
from avatar_rl.cluster.cli_types import PATH, RECIPE

if TYPE_CHECKING:
    from avatar_rl.cluster.annotation.asking import EndpointOptions
    from avatar_rl.prompts.record import Modality


@click.group()
def data() -> None:
    """Datasets."""


@data.command()
@click.argument("dataset", type=PATH)
@click.option(
    "--recipe",
    type=RECIPE,
    help="Take data settings, context length and model from this recipe.",
)
@click.option("--no-decode", is_flag=True, help="Do not open the media files.")
def validate(dataset: Path, recipe: Path | None, no_decode: bool) -> int:
    """Check a dataset and its media."""
    from avatar_rl.cluster.commands.data import validate_dataset

    return validate_dataset(dataset, recipe=recipe, decode=not no_decode)


@data.command()
@click.argument("folder", type=PATH)
@click.option("--recipe", type=RECIPE, help="Take data.synthetic from this recipe.")
@click.option("--seed", type=int)
def synthesize(folder: Path, recipe: Path | None, seed: int | None) -> int:
    """Write the synthetic audio-visual world."""
    from avatar_rl.cluster.commands.data import synthesize_world

    return synthesize_world(folder, recipe=recipe, seed=seed)


@data.command()
@click.argument("name")
@click.option(
    "--revision", default="main", help="Branch, tag or commit of the dataset (default main)."
)
@click.option("--out", type=PATH, help="Folder to fetch to (default data/NAME).")
@click.option("--only", multiple=True, help="Only files of this pattern; may be repeated.")
def fetch(name: str, revision: str, out: Path | None, only: tuple[str, ...]) -> int:
    """Fetch a public dataset from the hub and convert its rows ("list" shows them).

    Files are compared with the hub's checksums. A second start fetches what is missing.
    """
    from avatar_rl.cluster.hub.fetch import fetch, list_datasets

    return list_datasets() if name == "list" else fetch(name, revision, out, only)


@data.command()
@asks_endpoint
@click.option(
    "--attach",
    multiple=True,
    type=click.Choice(["video", "image", "audio", "none"]),
    default=("video", "image", "audio"),
    help="Media that the scorer is shown; may be repeated (default: all).",
)
@click.option(
    "--frames", type=click.IntRange(min=1), default=8, help="Most frames of a sample (default 8)."
)
def score(attach: tuple[str, ...], frames: int, **asked: Unpack[EndpointOptions]) -> int:
    """Have a model score each sample: needs picture, needs sound, logic, answer, composite.

    Resumable: a rerun with the same --out asks only for what is missing.
    """
    from avatar_rl.cluster.annotation.scores import score

    kinds = cast("tuple[Modality, ...]", tuple(kind for kind in attach if kind != "none"))
    return score(asked, kinds, frames)


@data.command()
@asks_endpoint
@click.option("--categories", type=PATH, help="Taxonomy, lines 'name: what belongs to it'.")
def classify(categories: Path | None, **asked: Unpack[EndpointOptions]) -> int:
    """Have a model put each sample into one category.

    Resumable: a rerun with the same --out asks only for what is missing.
    """
    from avatar_rl.cluster.annotation.categories import classify

    return classify(asked, categories)


LEAST = click.IntRange(min=0, max=10)


@data.command("filter")
@click.argument("dataset", type=PATH)
@click.option("--out", type=PATH, required=True, help="Dataset (.jsonl) that is written.")
@click.option("--answer", type=LEAST, default=10, help="Least score of the answer (default 10).")
@click.option("--logic", type=LEAST, default=8, help="Least score of the question (default 8).")
@click.option("--composite", type=LEAST, default=7, help="Least composite score (default 7).")
@click.option("--video", type=LEAST, default=0, help="Least need of the picture.")
@click.option("--audio", type=LEAST, default=0, help="Least need of the sound.")
@click.option("--fusion", is_flag=True, help="The subset for modality-attentive fusion: both 7.")
def filter_samples(dataset: Path, out: Path, fusion: bool, **least: int) -> int:
    """Keep the samples whose scores are high enough."""
    from avatar_rl.cluster.annotation.funnel import Thresholds, filter_dataset, print_funnel

    if fusion:
        least |= {"video": max(7, least["video"]), "audio": max(7, least["audio"])}
    filter_dataset(dataset, out, Thresholds(**least))
    return print_funnel(out)


@data.command()
@click.argument("dataset", type=PATH)
@click.option("--out", type=PATH, required=True, help="Dataset (.jsonl) that is written.")
@click.option("--smallest", type=int, default=10, help="Drop categories below this (default 10).")
@click.option(
    "--cap", type=float, default=3.0, help="Largest category over the second (default 3)."
)
def balance(dataset: Path, out: Path, smallest: int, cap: float) -> int:
    """Drop small categories and cut the largest."""
    from avatar_rl.cluster.annotation.funnel import balance_dataset, print_funnel

    balance_dataset(dataset, out, smallest=smallest, cap=cap)
    return print_funnel(out)


@data.command()
@click.argument("dataset", type=PATH)
def funnel(dataset: Path) -> int:
    """How many samples each step left, up to DATASET."""
    from avatar_rl.cluster.annotation.funnel import print_funnel

    return print_funnel(dataset)
