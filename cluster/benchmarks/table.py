"""Results of checkpoints side by side, as the papers' tables have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from avatar_rl.cluster.benchmarks.answers import read_answers
from avatar_rl.cluster.benchmarks.lmms import FOLDER_PREFIX
from avatar_rl.cluster.benchmarks.metrics import accuracy, change, interval_of
from avatar_rl.cluster.benchmarks.record import Marked, Means, Weighed, value_of
from avatar_rl.cluster.benchmarks.sets import benchmark_set
from avatar_rl.common.errors import ConfigError

#: Not significant against the first checkpoint (p >= 0.05, paired).
DAGGER = "\N{DAGGER}"

Figures = Mapping[str, Weighed]


def finished_sets(folder: Path) -> list[str]:
    """Names of the sets that ``folder`` holds results of."""
    return sorted(path.parent.name for path in folder.glob("*/result.json"))


def comparison(folders: Sequence[Path]) -> str:
    """A Markdown table: a column for each checkpoint, a row for each set and below it one for each
    value of the set's first part (WorldSense: its tasks).

    Every cell has the accuracy in percent with its 95 % interval. From the second column on the
    change against the first is added, with a dagger where it is not significant. Both are of the
    questions that the two answered. Raises ConfigError where a folder holds no result or none is
    shared, DataError where answers are missing."""
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
    for name in shared:
        lines += _rows(name, [read_answers(folder / name) for folder in folders])
    if len(folders) > 1:
        lines += [
            "",
            f"Accuracy in %, [95 % interval], change against {folders[0].name} over the questions "
            f"that both answered; {DAGGER} = not significant (paired test, p >= 0.05).",
        ]
    return "\n".join(lines)


def _rows(name: str, answers: Sequence[Sequence[Marked]]) -> list[str]:
    title, means = _set_of(name)
    columns = [means(marked) for marked in answers]
    shared = [None, *(_shared(means, answers[0], other) for other in answers[1:])]
    first = next((part for one in answers[0] for part in one.question.parts), None)
    figures = [x for x in columns[0] if x == "accuracy" or x.partition("/")[0] == first]
    return [
        _line(
            [
                title if figure == "accuracy" else f"- {figure.partition('/')[2]}",
                *(_cell(figure, *column) for column in zip(columns, shared, strict=True)),
            ]
        )
        for figure in figures
    ]


def _cell(figure: str, column: Figures, shared: tuple[Figures, Figures] | None) -> str:
    if figure not in column:
        return ""
    found, within = value_of(column[figure]), interval_of(column[figure])
    cell = f"{100 * found:.1f} [{100 * within.low:.1f}, {100 * within.high:.1f}]"
    if shared is None or figure not in shared[0]:
        return cell
    changed = change(*(figures[figure] for figures in shared))
    return f"{cell} {100 * changed.value:+.1f}{'' if changed.significant else DAGGER}"


def _shared(
    means: Means, base: Sequence[Marked], other: Sequence[Marked]
) -> tuple[Figures, Figures]:
    """The figures of two checkpoints, both made of the questions that both answered."""
    given = {one.question.id: one for one in other}
    both = [one for one in base if one.question.id in given]
    return means(both), means(
        [replace(given[one.question.id], question=one.question) for one in both]
    )


def _set_of(name: str) -> tuple[str, Means]:
    """Title and figures of a set; of a task of lmms-eval, which need not be installed here."""
    if name.startswith(FOLDER_PREFIX):
        return name.removeprefix(FOLDER_PREFIX), accuracy
    one = benchmark_set(name)
    return one.title, one.means


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
