"""Options of a command that asks a model about every prompt of a dataset."""

from __future__ import annotations

import click

from avatar_rl.cluster.cli_types import PATH, RECIPE, Command


def asks_endpoint(command: Command) -> Command:
    """Give a command its dataset, its endpoint and its bounds."""
    options = (
        click.argument("dataset", type=PATH),
        click.option(
            "--base-url",
            required=True,
            help="OpenAI-compatible endpoint, e.g. http://teacher:8000/v1",
        ),
        click.option("--model", required=True, help="Model name the endpoint serves."),
        click.option("--out", type=PATH, required=True, help="Dataset (.jsonl), appended to."),
        click.option("--api-key-env", help="Environment variable that holds the API key."),
        click.option(
            "--concurrency",
            type=click.IntRange(min=1),
            default=16,
            help="Requests in flight (default 16).",
        ),
        click.option(
            "--deadline",
            type=click.FloatRange(min=0, min_open=True),
            default=300.0,
            help="Seconds per prompt with retries.",
        ),
        click.option("--recipe", type=RECIPE, help="Take data.reader from this recipe."),
        click.option(
            "--price-in", type=float, default=0.0, help="Price of a million prompt tokens."
        ),
        click.option(
            "--price-out", type=float, default=0.0, help="Price of a million completion tokens."
        ),
        click.option(
            "--max-cost",
            type=click.FloatRange(min=0, min_open=True),
            help="Ask no more once this was spent.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
