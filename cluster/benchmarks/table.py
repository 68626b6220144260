"""Results of checkpoints side by side, as the papers' tables have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from avatar_rl.cluster.benchmarks.answers import read_scores
from avatar_rl.cluster.benchmarks.intervals import paired
from avatar_rl.cluster.benchmarks.sets import benchmark_set
from avatar_rl.common.errors import ConfigError

#: Not significant against the checkpoint before it (p >= 0.05, paired).
DAGGER = "\N{DAGGER}"


def finished_sets(folder: Path) -> list[str]:
    """Names of the sets that ``folder`` holds results of."""
    return sorted(path.parent.name for path in folder.glob("*/result.json"))


def comparison(folders: Sequence[Path]) -> str:
    """A Markdown table: a row for each set, a column for each checkpoint.

    Every cell has the accuracy in percent with its 95 % interval. From the second column on the
    change against the first is added, with a dagger where it is not significant on the questions
    that both answered. Raises ConfigError where a folder holds no result or none is shared."""
    names = [set(finished_sets(folder)) for folder in folders]
    for folder, found in zip(folders, names, strict=True):
        if not found:
            raise ConfigError(
                f"{folder} holds no results: give what `avatar evaluate --benchmark ... --out` made"
            )
    shared = sorted(set.intersection(*names))
    if not shared:
        raise ConfigError(f"{', '.join(map(str, folders))} share no set: evaluate the same ones")
    head = ["set", *(folder.name for folder in folders)]
    lines = [_line(head), _line(["---", *("---:" for _ in folders)])]
    lines += [_line([benchmark_set(name).title, *_cells(name, folders)]) for name in shared]
    if len(folders) > 1:
        lines += [
            "",
            f"Accuracy in %, [95 % interval], change against {folders[0].name}; {DAGGER} = not "
            "significant (paired test, p >= 0.05).",
        ]
    return "\n".join(lines)


def _cells(name: str, folders: Sequence[Path]) -> list[str]:
    first = read_scores(folders[0] / name)
    base = 0.0
    cells = []
    for position, folder in enumerate(folders):
        result = json.loads((folder / name / "result.json").read_text())
        accuracy = 100 * result["figures"]["accuracy"]
        low, high = (100 * bound for bound in result["interval"])
        cell = f"{accuracy:.1f} [{low:.1f}, {high:.1f}]"
        if position == 0:
            base = accuracy
        else:
            scores = read_scores(folder / name)
            both = sorted(first.keys() & scores.keys())
            change = paired([first[id_] for id_ in both], [scores[id_] for id_ in both])
            cell += f" {accuracy - base:+.1f}{'' if change.significant else DAGGER}"
        cells.append(cell)
    return cells


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
