"""`avatar hints generate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.prompts.config import DataConfig


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    hints = commands.add_parser("hints", help="hints for prompts that stay hard").add_subparsers(
        dest="hints_command", required=True
    )
    generate = hints.add_parser(
        "generate",
        help="have a teacher write one hint per prompt",
        description="Resumable: a rerun with the same --out asks only for what is missing.",
    )
    generate.add_argument("dataset", type=Path)
    generate.add_argument(
        "--base-url", required=True, help="OpenAI-compatible endpoint, e.g. http://teacher:8000/v1"
    )
    generate.add_argument("--model", required=True, help="model name the endpoint serves")
    generate.add_argument(
        "--out", type=Path, required=True, help="dataset with hints (.jsonl), appended to"
    )
    generate.add_argument("--api-key-env", help="environment variable that holds the API key")
    generate.add_argument(
        "--concurrency", type=int, default=16, help="requests in flight (default 16)"
    )
    generate.add_argument(
        "--deadline", type=float, default=300.0, help="seconds per prompt, retries included"
    )
    generate.add_argument("--recipe", type=Path, help="take data.reader from this recipe")
    generate.add_argument(
        "--price-in", type=float, default=0.0, help="price of a million prompt tokens"
    )
    generate.add_argument(
        "--price-out", type=float, default=0.0, help="price of a million completion tokens"
    )
    generate.set_defaults(run=generate_command)


def generate_command(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Exit code 1 when a prompt got no reply: run it again."""
    from rich.console import Console

    from avatar_rl.cluster.commands.hint_generation import generate_hints
    from avatar_rl.common.endpoint_config import EndpointConfig

    reader = load_recipe(options.recipe).data.reader if options.recipe else DataConfig()
    teacher = EndpointConfig(
        base_url=options.base_url,
        model=options.model,
        api_key_env=options.api_key_env,
        temperature=0.7,
        concurrency=options.concurrency,
        deadline_s=options.deadline,
    )
    console = Console(highlight=False)
    with console.status("asking the teacher") as status:
        report = generate_hints(
            options.dataset,
            options.out,
            teacher,
            reader,
            progress=lambda done, total: status.update(f"{done}/{total} prompts"),
        )
    counts = report.counts
    console.print(
        f"{counts['written']} hints written, {counts['kept']} kept, {counts['done_before']} done "
        "before, "
        f"{counts['refused']} refused (the answer was in them twice), {counts['failed']} without "
        "a reply"
    )
    cost = report.cost(options.price_in, options.price_out)
    console.print(
        f"{report.requests} requests, {report.prompt_tokens:,} + {report.completion_tokens:,} "
        "tokens" + (f", cost {cost:.2f}" if cost else "")
    )
    console.print(f"dataset      {report.out}")
    return 1 if counts["failed"] else 0
