"""The stage table: held-out accuracy after every stage by question type and by the modality it
needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avatar_rl.cluster.curriculum.record import CurriculumState, Result
from avatar_rl.cluster.curriculum.stages import Curriculum
from avatar_rl.cluster.telemetry.report import page_template
from avatar_rl.cluster.telemetry.screen import duration
from avatar_rl.common.files import replace_text


@dataclass(frozen=True)
class Line:
    """One row: a held-out accuracy after each stage; ``trained`` marks the stages that trained this
    type."""

    group: str  # "", "type" or "needs"
    name: str
    values: list[float | None]
    trained: list[bool]


def lines(state: CurriculumState) -> list[Line]:
    """Overall, each question type, each set of modalities; values are None where a stage was not
    evaluated."""
    results = [record.after for record in state.stages]
    blank = [False] * len(results)
    found = [
        Line("", "all prompts", [result.accuracy if result else None for result in results], blank)
    ]
    for group, family in (("type", "by_category"), ("needs", "by_need")):
        for name in sorted(
            {name for result in results if result for name in getattr(result, family)}
        ):
            values = [getattr(result, family).get(name) if result else None for result in results]
            trained = [group == "type" and name in record.categories for record in state.stages]
            found.append(Line(group, name, values, trained))
    return found


def footers(state: CurriculumState) -> list[str]:
    """What the last policy can do without one of its modalities, beside what it can do with all of
    them."""
    full = state.stages[-1].after if state.stages else None
    if full is None:
        return []
    return [
        f"{state.stages[-1].name} without {sense}: {_needs(result, full)}"
        for sense, result in state.modalities.items()
    ]


def _needs(result: Result, full: Result) -> str:
    parts = [f"all {full.accuracy:.2f} -> {result.accuracy:.2f}"]
    parts += [
        f"needs {need} {full.by_need[need]:.2f} -> {value:.2f}"
        for need, value in sorted(result.by_need.items())
        if need in full.by_need
    ]
    return ", ".join(parts)


def print_stages(state: CurriculumState, console: Console) -> None:
    """The table on a terminal; a stage's own types are bold."""
    table = Table(title="held-out accuracy after each stage", title_justify="left")
    table.add_column("")
    for record in state.stages:
        table.add_column(escape(record.name), justify="right")
    group = ""
    for line in lines(state):
        if line.group != group:
            table.add_section()
            group = line.group
        cells = [
            _cell(value, bold=own) for value, own in zip(line.values, line.trained, strict=True)
        ]
        table.add_row(escape(f"needs {line.name}" if line.group == "needs" else line.name), *cells)
    table.add_section()
    table.add_row("completions", *(f"{record.completions:,}" for record in state.stages))
    table.add_row("time", *(duration(record.seconds) for record in state.stages))
    console.print(table)
    for footer in footers(state):
        console.print(escape(footer), highlight=False)


def _cell(value: float | None, *, bold: bool) -> str:
    text = "-" if value is None else f"{value:.2f}"
    return f"[bold]{text}[/]" if bold else text


def write_stage_report(folder: Path, curriculum: Curriculum, state: CurriculumState) -> None:
    """report.md and report.html of a curriculum folder, from its state; both name every stage's
    run."""
    replace_text(folder / "report.md", markdown(curriculum.name, state))
    replace_text(folder / "report.html", _page(curriculum.name, state))


def markdown(name: str, state: CurriculumState) -> str:
    header = ["", *(record.name for record in state.stages)]
    rows = [header, ["---"] * len(header)]
    for line in lines(state):
        label = f"needs {line.name}" if line.group == "needs" else line.name
        cells = ["-" if value is None else f"{value:.3f}" for value in line.values]
        rows.append(
            [label, *(f"**{c}**" if own else c for c, own in zip(cells, line.trained, strict=True))]
        )
    rows.append(["completions", *(f"{record.completions:,}" for record in state.stages)])
    rows.append(["time", *(duration(record.seconds) for record in state.stages)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    trains = "\n".join(
        f"- **{record.name}** trains {record.trains}; run `{record.run}`" for record in state.stages
    )
    ends = "\n".join(f"- {footer}" for footer in footers(state))
    return (
        f"# Curriculum {name}\n\nHeld-out accuracy after each stage; bold where the stage trained "
        "the type.\n\n"
        f"{table}\n\n{trains}\n\n{ends}\n"
    )


def _page(name: str, state: CurriculumState) -> str:
    """The table as a self-contained page."""
    return page_template("curriculum.html").render(
        name=name, records=state.stages, lines=lines(state), footers=footers(state)
    )
