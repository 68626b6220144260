"""Sums in two steps, told in words: a task with an answer that can be checked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

from avatar_rl.common.files import replace_text

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Kim", "Leo", "Mia")
THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles", "pears")

#: How far a guess is off.
MISSES = tuple(miss for miss in range(-9, 10) if miss)


class Problem(TypedDict):
    """A row of the native layout (docs/data.md)."""

    id: str
    question: str
    answer: str
    problem_type: str
    category: str
    reasoning: str


def lost(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    """Question, reasoning and answer of a sum and a difference."""
    first, more = rng.randint(11, 60), rng.randint(5, 39)
    total = first + more
    gone = rng.randint(3, min(total - 1, 49))
    question = (
        f"{name} has {first} {thing}, gets {more} more and then loses {gone}. "
        f"How many {thing} are left?"
    )
    left = total - gone
    return question, f"{first} + {more} = {total}. {total} - {gone} = {left}.", left


def boxes(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    """Of a product and a difference."""
    count, each = rng.randint(2, 4), rng.randint(5, 19)
    total = count * each
    gone = rng.randint(2, total - 1)
    question = (
        f"{name} buys {count} boxes of {each} {thing} each and gives {gone} away. "
        f"How many {thing} are left?"
    )
    left = total - gone
    return question, f"{count} * {each} = {total}. {total} - {gone} = {left}.", left


def together(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    """Of two sums."""
    first, more = rng.randint(11, 60), rng.randint(5, 39)
    friend = first + more
    question = (
        f"{name} has {first} {thing}. A friend has {more} more than that. "
        f"How many {thing} do they have together?"
    )
    both = first + friend
    return question, f"{first} + {more} = {friend}. {first} + {friend} = {both}.", both


KINDS: tuple[Callable[[random.Random, str, str], tuple[str, str, int]], ...] = (
    lost,
    boxes,
    together,
)


def write_problems(
    folder: Path,
    counts: Mapping[str, int],
    *,
    guessed: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """A file ``folder/NAME.jsonl`` with so many problems for each name; no sum is in two of them,
    nor twice in one, whatever names and things it is told of. The paths, by name.

    ``guessed``: by name, the share of its rows that guess in place of working it out, and miss."""
    rng, guessing = random.Random(seed), random.Random(seed + 1)
    seen: set[str] = set()
    files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        rows: list[Problem] = []
        while len(rows) < count:
            kind = rng.choice(KINDS)
            question, reasoning, answer = kind(rng, rng.choice(NAMES), rng.choice(THINGS))
            if reasoning in seen:
                continue
            seen.add(reasoning)
            if guessing.random() < (guessed or {}).get(name, 0.0):
                reasoning, answer = "I guess.", answer + guessing.choice(MISSES)
            rows.append(
                {
                    "id": f"{name}-{len(rows)}",
                    "question": question,
                    "answer": str(answer),
                    "problem_type": "numerical",
                    "category": kind.__name__,
                    "reasoning": reasoning,
                }
            )
        file = folder / f"{name}.jsonl"
        replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        files[name] = str(file.resolve())
    return files
