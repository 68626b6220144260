"""Whether a public set is ready: its layout is cited, a few rows in it are read with every field,
and its official figures come out as worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.marks import gold_fault, mark
from avatar_rl.cluster.benchmarks.record import BenchmarkSet
from avatar_rl.prompts.readers.rows import Value, Values
from tests.unit.published_sets import Published


class _Watched(dict[str, Value]):
    """A row that notes which of its fields are looked at, "metadata.subject" inside of it."""

    def __init__(self, values: Values, read: set[str], there: set[str], above: str = "") -> None:
        super().__init__(values)
        self._read, self._above = read, above
        for name, value in values.items():
            there.add(above + name)
            self[name] = _watched(value, read, there, f"{above}{name}.")

    def get(self, name: str, default: Value = None) -> Value:  # type: ignore[override]
        if name in self:
            self._read.add(self._above + name)
        return super().get(name, default)


def _watched(value: Value, read: set[str], there: set[str], above: str) -> Value:
    """Lists of questions and metadata hold fields; options and pictures are values."""
    if isinstance(value, dict) and above == "metadata.":
        return _Watched(value, read, there, above)
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [_Watched(one, read, there, above) for one in value if isinstance(one, dict)]
    return value


class _WatchedFolder(SetFolder):
    def __init__(self, root: Path, media: Path) -> None:
        super().__init__(root, media)
        self.read: set[str] = set()
        self.there: set[str] = set()

    def rows(self, *patterns: str) -> Iterator[SetRow]:
        for row in super().rows(*patterns):
            yield SetRow(_Watched(row.values, self.read, self.there), row.where)


def faults(one: BenchmarkSet, published: Published, folder: Path) -> list[str]:
    """What is not as published, in words; none: the set is ready. Writes below ``folder``."""
    root, media = folder / one.name, folder / "media" / one.name
    published.write(root)
    watched = _WatchedFolder(root, media)
    questions = list(one.read(watched))
    marked = [mark(q, text) for q, text in zip(questions, published.completions, strict=True)]
    figures = one.metric(marked)
    expected = {
        "an address of the layout": (one.layout.startswith("https://"), True),
        "media": (list(watched.missing), []),
        "gold answers": ([q.answer for q in questions], list(published.answers)),
        "reachable gold answers": ([gold_fault(q) for q in questions], [None] * len(questions)),
        "options": ([len(q.options) for q in questions], list(published.options)),
        "the authors' words": (published.says in questions[0].official, True),
        "text and parts": ([bool(q.text and q.parts) for q in questions], [True] * len(questions)),
        "fields": (watched.there - watched.read, set(published.unread)),
        "the headline": (next(iter(figures)), "accuracy"),
    }
    wrong = [f"{what}: {found!r}" for what, (found, due) in expected.items() if found != due]
    for question, end in zip(questions, published.media, strict=True):
        path = Path(question.media[0].uri)
        if not path.is_file() or (path.name != end if end else path.parent != media.resolve()):
            wrong.append(f"media: {path}")
    return wrong + [
        f"figure {name}: {figures.get(name)} for {value}"
        for name, value in published.figures.items()
        if not math.isclose(figures.get(name, math.nan), value, rel_tol=1e-9, abs_tol=1e-9)
    ]
