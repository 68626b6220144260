"""Checks a whole dataset before a run does: every row, every file, every prompt's length. Goes on
after a fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avatar_rl.common.errors import DataError, InputError
from avatar_rl.common.text import printable
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig
from avatar_rl.prompts.datasets import RowReader, iter_rows, media_base
from avatar_rl.prompts.hints import hint_leaks
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt, check_roots, resolve_uri

if TYPE_CHECKING:
    from avatar_rl.prompts.encoding.template import PromptEncoder

_SHOWN = 50


class Problem(NamedTuple):
    """One thing wrong with a dataset."""

    where: str  # "file:line"
    id: str  # of the prompt; empty where the row could not be read
    what: str
    remedy: str


@dataclass
class ValidationReport:
    """What a dataset holds and what is wrong with it."""

    path: Path
    layout: str = "auto"
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    types: Counter[str] = field(default_factory=Counter)  # prompts by problem type
    modalities: Counter[str] = field(
        default_factory=Counter
    )  # prompts by "video+audio", ..., "text"
    files: int = 0  # media items looked at
    longest: int = 0  # tokens of the longest prompt; 0 without a processor

    @property
    def ok(self) -> bool:
        return not self.problems


def validate(
    path: Path,
    config: DataConfig,
    *,
    decode: bool,
    processor_path: Path | None = None,
    template: TemplateConfig | None = None,
    media: MediaConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> ValidationReport:
    """Reads every row; with ``decode`` every medium, too; with a model folder also every prompt's
    length in tokens.

    ``progress`` is called with the number of rows done after each. Faults are collected, not
    raised; only a ``processor_path`` that cannot be loaded raises (ModelError)."""
    report = ValidationReport(path)
    loader = MediaLoader(media or MediaConfig(), media_base(path, config))
    encoder = None
    if processor_path is not None:
        encoder = _encoder(processor_path, loader, template or TemplateConfig())
    reader = RowReader(config)
    try:
        for row in iter_rows(path, config):
            report.rows += 1
            try:
                prompt = reader.read(row)
            except InputError as error:
                report.problems.append(Problem(error.where, "", error.what, error.remedy))
            else:
                _count(report, prompt)
                report.problems += (
                    Problem(row.where, prompt.id, what, remedy)
                    for what, remedy in _faults(prompt, loader, encoder, decode, report)
                )
            if progress is not None:
                progress(report.rows)
    except (
        InputError
    ) as error:  # the dataset itself: missing, empty, or broken so that no next row can be found
        report.problems.append(Problem(error.where, "", error.what, error.remedy))
    report.layout = reader.layout
    return report


def render(report: ValidationReport, console: Console) -> None:
    """Counts, and a table of the problems."""
    console.print(
        f"[bold]{escape(str(report.path))}[/]  {report.rows} rows, layout {report.layout}",
        highlight=False,
    )
    counts = [
        f"{name} {number}"
        for counter in (report.types, report.modalities)
        for name, number in counter.items()
    ]
    console.print(
        f"  {', '.join(counts) or 'no prompts'}; {report.files} media checked", highlight=False
    )
    if report.longest:
        console.print(f"  longest prompt {report.longest} tokens", highlight=False)
    if report.ok:
        console.print("[green]no problems[/]")
        return
    count = len(report.problems)
    table = Table(
        title=f"{count} problem{'s' if count > 1 else ''}", title_style="bold red", show_lines=False
    )
    for header in ("where", "id", "what is wrong", "what to do"):
        table.add_column(header, overflow="fold")
    for problem in report.problems[:_SHOWN]:
        table.add_row(*(escape(printable(text)) for text in problem))
    console.print(table)
    if len(report.problems) > _SHOWN:
        console.print(f"... and {len(report.problems) - _SHOWN} more")


def _count(report: ValidationReport, prompt: Prompt) -> None:
    report.types[prompt.problem_type.value] += 1
    kinds = [kind for kind in ("video", "audio", "image") if prompt.media.of(kind)]  # type: ignore[arg-type]
    report.modalities["+".join(kinds) or "text"] += 1


def _faults(
    prompt: Prompt,
    loader: MediaLoader,
    encoder: PromptEncoder | None,
    decode: bool,
    report: ValidationReport,
) -> Iterator[tuple[str, str]]:
    """(what, remedy) of everything wrong with a prompt that could be read."""
    if hint_leaks(prompt):
        yield (
            f"the hint gives the answer away: {prompt.hint!r}",
            "write a strategy instead, or drop the hint",
        )
    for kind in prompt.needs:
        if not prompt.media.of(kind):
            yield f"needs {kind} but has none", "add the medium, or correct `needs`"
    playable = True
    for item in prompt.media.items:
        report.files += 1
        try:
            if decode:
                loader.load(item)
            else:
                path = resolve_uri(item.uri, loader.base)
                check_roots(path, loader.config.roots)
                if not path.is_file() or path.stat().st_size == 0:
                    loader.load(item)  # says what is wrong with it
        except InputError as error:
            playable = False
            yield f"{error.where}: {error.what}", error.remedy
    if encoder is None or not playable:
        return
    try:
        encoded = encoder.encode(
            prompt, hinted=prompt.hint is not None
        )  # the hint is part of the longest form
    except DataError as error:
        what, _, remedy = str(error).rpartition(": ")
        yield what or remedy, remedy if what else "see the message"
    else:
        report.longest = max(report.longest, len(encoded.input_ids))


def _encoder(processor_path: Path, loader: MediaLoader, template: TemplateConfig) -> PromptEncoder:
    from avatar_rl.prompts.encoding.template import PromptEncoder  # brings torch and transformers

    return PromptEncoder(processor_path, loader, template.model_copy(update={"cache_bytes": 0}))
