"""A synthetic world whose cold start answers some question types by habit: a fixed answer, unless
it is shown a hint. Prompts to which that answer is wrong in every part make a pool of rare
successes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar_rl.common.files import read_jsonl, replace_text
from avatar_rl.prompts.synthetic.config import Category, WorldConfig
from avatar_rl.prompts.synthetic.world import synthesize


@dataclass(frozen=True)
class Habits:
    """What the cold start is taught to say, and how often it is taught to look instead."""

    answers: Mapping[Category, str]
    hinted_share: float = 0.5
    # of the prompts without a hint that are answered by looking: RL alone has a little to find
    look_share: float = 0.04

    def taught(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """Row ``number`` of sft.jsonl as the cold start shall see it."""
        answer = self.answers.get(Category(row["category"]))
        if answer is None:
            return row
        if number % round(1 / self.hinted_share) == 0:
            return row | {"extra": row["extra"] | {"hinted": "true"}}
        if number % round(1 / self.look_share) == 1:
            return row
        return row | {"answer": answer, "reasoning": f"maybe {answer}"}

    def fails(self, row: dict[str, Any]) -> bool:
        """Whether the habit is wrong in every part of the row's answer."""
        answer = self.answers[Category(row["category"])]
        return not any(part in row["answer"] for part in answer.split(" / "))


def make_world(
    folder: Path, world: WorldConfig, habits: Habits, *, pool: int, heldout: int = 0
) -> dict[str, str]:
    """The pool, the held-out prompts and the cold start's beside their media; made once. Returns
    files by name (sft, train, and heldout where any are asked for).

    Both hold as many prompts of each habit. Raises ValueError where the world has too few."""
    if not folder.is_dir():
        synthesize(folder, world)
    rows = {
        "sft": [habits.taught(*row) for row in enumerate(read_jsonl(folder / "sft.jsonl"))],
        "train": _select(folder / "train.jsonl", habits, pool),
    }
    if heldout:
        rows["heldout"] = _select(folder / "heldout.jsonl", habits, heldout)
    files = {}
    for name, kept in rows.items():
        files[name] = str((folder / f"bench-{name}.jsonl").resolve())
        replace_text(Path(files[name]), "".join(json.dumps(row) + "\n" for row in kept))
    return files


def _select(source: Path, habits: Habits, count: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_jsonl(source):
        if habits.fails(row):
            found[row["category"]].append(row)
    each, rest = divmod(count, len(habits.answers))
    if rest or min(len(found[name]) for name in habits.answers) < each:
        fewest = {str(name): len(found[name]) for name in habits.answers}
        raise ValueError(
            f"{source.name}: {each} prompts of every habit that are wrong in every part were to "
            f"make {count}, there are {fewest}: raise n_train or n_heldout"
        )
    return [found[name][rank] for rank in range(each) for name in habits.answers]
